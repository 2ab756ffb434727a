// Starts the page: its two views and the list of conversations on narrow screens.
import { startChat } from "./chat.js";
import { byId } from "./dom.js";
import { startStatus } from "./status.js";

function showView(name) {
  for (const each of ["chat", "status"]) {
    byId(each).hidden = each !== name;
    byId(`to-${each}`).setAttribute("aria-pressed", String(each === name));
  }
  document.body.dataset.view = name;
}

for (const name of ["chat", "status"]) byId(`to-${name}`).addEventListener("click", () => showView(name));
byId("menu").addEventListener("click", () => {
  const isOpen = document.body.classList.toggle("menu-open");
  byId("menu").setAttribute("aria-expanded", String(isOpen));
});
showView("chat");
startChat();
void startStatus();

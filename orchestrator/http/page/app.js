// Starts the page: its two views and the list of conversations on narrow screens.
import { startChat } from "./chat.js";
import { byId, showMenu } from "./dom.js";
import { startStatus } from "./status.js";

function showView(name) {
  for (const each of ["chat", "status"]) {
    byId(each).hidden = each !== name;
    byId(`to-${each}`).setAttribute("aria-pressed", String(each === name));
  }
  document.body.dataset.view = name;
}

for (const name of ["chat", "status"]) byId(`to-${name}`).addEventListener("click", () => showView(name));
byId("menu").addEventListener("click", () => showMenu(!document.body.classList.contains("menu-open")));
byId("chat").addEventListener("click", () => showMenu(false));
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || !document.body.classList.contains("menu-open")) return;
  event.stopImmediatePropagation(); // it closes the list, and stops no answer
  showMenu(false);
  byId("menu").focus();
});
showView("chat");
startChat();
void startStatus();

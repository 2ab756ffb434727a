// The view of conversations: the list, the messages of one, and the field for the next message.
import { streamAnswer } from "./answer.js";
import * as store from "./conversations.js";
import { byId, element, showMenu } from "./dom.js";
import { messageNode, updateMessage } from "./message.js";
import { makeSettings, openSettings } from "./settings.js";

const NEAR_END = 80; // pixels: so near to the end the view follows an answer
const SAVE_MS = 3000;
const NARROW = 600; // pixels: the longer text would be cut
const running = new Map(); // conversation id: {controller, conversation}
const isTouched = matchMedia("(pointer: coarse)").matches; // its keyboard has no Shift+Enter: Enter begins a line
let shown;

export function startChat() {
  makeSettings();
  if (isTouched || innerWidth < NARROW) byId("input").placeholder = "Message";
  const all = store.allConversations();
  show(all.find((each) => each.id === store.lastId()) ?? all[0] ?? store.newConversation());
  byId("new").addEventListener("click", () => {
    show(shown.messages.length ? store.newConversation(shown) : shown);
    byId("input").focus();
  });
  byId("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  byId("input").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing || isTouched) return;
    event.preventDefault();
    send();
  });
  byId("input").addEventListener("input", fitInput);
  byId("stop").addEventListener("click", stop);
  byId("to-settings").addEventListener("click", () => openSettings(shown, () => keep(shown)));
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !document.querySelector("dialog[open]")) stop();
  });
  addEventListener("pagehide", () => running.forEach(({ conversation }) => keep(conversation)));
}

function stop() {
  running.get(shown.id)?.controller.abort();
  byId("input").focus();
}

function send() {
  const text = byId("input").value;
  if (!text.trim() || running.has(shown.id)) return;
  byId("input").value = "";
  fitInput();
  shown.messages.push({ role: "user", content: text });
  byId("messages").append(messageNode(shown.messages.at(-1)));
  void answer(shown);
}

function retry() {
  if (running.has(shown.id)) return;
  shown.messages.pop();
  showMessages();
  void answer(shown);
}

async function answer(conversation) {
  const message = { role: "assistant", content: "", reasoning: "" };
  const controller = new AbortController();
  conversation.messages.push(message);
  running.set(conversation.id, { controller, conversation });
  keep(conversation);
  if (conversation === shown) byId("messages").append(messageNode(message, retry));
  showRunning();
  scrollToEnd();
  let isDue = false;
  let saved = performance.now();
  await streamAnswer(conversation, message, controller.signal, () => {
    if (isDue) return;
    isDue = true;
    requestAnimationFrame(() => {
      isDue = false;
      if (running.has(conversation.id)) follow(conversation, message, true);
      if (performance.now() - saved < SAVE_MS || !running.has(conversation.id)) return;
      saved = performance.now();
      keep(conversation);
    });
  });
  running.delete(conversation.id);
  if (store.isKept(conversation)) keep(conversation);
  follow(conversation, message, false);
  showRunning();
}

// Show what has come of an answer, if its conversation is on the page, and stay at its end if the user is there.
function follow(conversation, message, isRunning) {
  if (conversation !== shown) return;
  const view = byId("messages");
  const isAtEnd = view.scrollHeight - view.scrollTop - view.clientHeight < NEAR_END;
  updateMessage(view.lastElementChild, message, isRunning);
  if (isRunning) byId("speed").textContent = message.speed ?? "";
  if (isAtEnd) scrollToEnd();
}

function scrollToEnd() {
  byId("messages").scrollTop = byId("messages").scrollHeight;
}

function show(conversation) {
  shown = running.get(conversation.id)?.conversation ?? conversation;
  store.setLastId(shown.id);
  showMenu(false);
  showMessages();
  showRunning();
  showList();
}

function showMessages() {
  const nodes = shown.messages.map((message) => messageNode(message, retry));
  const empty = element("p", { class: "empty" }, "Ask something. The answer comes from this server, and stays here.");
  byId("messages").replaceChildren(...(nodes.length ? nodes : [empty]));
  scrollToEnd();
}

function showRunning() {
  const isRunning = running.has(shown.id);
  const last = shown.messages.at(-1);
  if (isRunning) updateMessage(byId("messages").lastElementChild, last, true);
  if (last) byId("messages").querySelector(".empty")?.remove();
  byId("stop").hidden = !isRunning;
  byId("send").hidden = isRunning;
  byId("speed").textContent = "";
}

function showList() {
  const found = store.allConversations();
  const all = found.some((each) => each.id === shown.id) ? found : [shown, ...found];
  byId("conversations").replaceChildren(...all.map((conversation) => {
    const title = store.titleOf(conversation);
    const open = element("button", { type: "button", class: "title", onclick: () => show(conversation) }, title);
    if (conversation.id === shown.id) open.setAttribute("aria-current", "true");
    const drop = element("button", { type: "button", class: "drop", "aria-label": `Delete: ${title}`, onclick: () => discard(conversation) }, "×");
    return element("li", {}, open, drop);
  }));
}

function discard(conversation) {
  if (conversation.messages.length && !confirm(`Delete “${store.titleOf(conversation)}”?`)) return;
  store.remove(conversation);
  running.get(conversation.id)?.controller.abort();
  running.delete(conversation.id); // so that no late piece keeps it again
  show(conversation.id === shown.id ? store.allConversations()[0] ?? store.newConversation(shown) : shown);
}

function keep(conversation) {
  try {
    store.save(conversation);
    byId("notice").hidden = true;
  } catch {
    byId("notice").textContent = "This browser has no room left for conversations: delete some to keep this one.";
    byId("notice").hidden = false;
  }
  showList();
}

function fitInput() {
  const input = byId("input");
  input.style.height = "auto";
  input.style.height = `${Math.min(input.scrollHeight + 2, innerHeight / 3)}px`;
}

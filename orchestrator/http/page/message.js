// One message on the page.
import { copyText, element } from "./dom.js";
import { renderMarkdown } from "./markdown.js";
import { splitReasoning } from "./reasoning.js";

// Return the node of a message. `retry` is called when the user asks for another answer.
export function messageNode(message, retry) {
  const node = element("article", { class: message.role, "aria-label": message.role === "user" ? "You" : "Answer" });
  if (message.role === "user") {
    node.append(element("div", { class: "text" }, message.content));
    return node;
  }
  const copy = element("button", { type: "button", onclick: () => copyText(splitReasoning(message.content).text, copy) }, "Copy");
  const again = element("button", { type: "button", class: "retry", onclick: retry }, "Retry");
  node.append(
    element("details", { hidden: true }, element("summary"), element("div", { class: "thought" })),
    element("div", { class: "text" }),
    element("p", { class: "error", role: "alert", hidden: true }),
    element("p", { class: "row foot" }, element("span", { class: "hint" }), copy, again),
  );
  updateMessage(node, message, false);
  return node;
}

// Bring the node of an answer up to date.
export function updateMessage(node, message, isRunning) {
  const { reasoning, text, isThinking } = splitReasoning(message.content, message.reasoning);
  const details = node.querySelector("details");
  details.hidden = !reasoning && !isThinking;
  details.querySelector("summary").textContent = isThinking && isRunning ? "Reasoning …" : "Reasoning";
  if (!details.hidden) renderMarkdown(details.querySelector(".thought"), reasoning);
  renderMarkdown(node.querySelector(".text"), text);
  const error = node.querySelector(".error");
  error.hidden = !message.error;
  error.textContent = message.error ?? "";
  const parts = [message.note, message.speed].filter(Boolean);
  node.querySelector(".hint").textContent = isRunning && !message.content ? "waiting …" : parts.join(" · ");
  node.classList.toggle("running", isRunning);
  node.setAttribute("aria-busy", String(isRunning));
}

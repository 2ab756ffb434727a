// The dialog with the system prompt and the sampling of a conversation.
import { byId, element } from "./dom.js";

const FIELDS = [
  // name of the API, label, least, most, step
  ["temperature", "Temperature", 0, 2, 0.05],
  ["top_p", "Top p", 0, 1, 0.01],
  ["top_k", "Top k", 0, 1000, 1],
  ["min_p", "Min p", 0, 1, 0.01],
  ["max_tokens", "Most new tokens", 1, 10000000, 1],
  ["repetition_penalty", "Repetition penalty", 0.05, 5, 0.05],
  ["presence_penalty", "Presence penalty", -2, 2, 0.1],
  ["frequency_penalty", "Frequency penalty", -2, 2, 0.1],
  ["seed", "Seed", 0, 2147483647, 1],
];

export function makeSettings() {
  for (const [name, label, min, max, step] of FIELDS) {
    const input = element("input", { id: `setting-${name}`, type: "number", min, max, step: step < 1 ? "any" : step });
    byId("sampling").append(element("div", {}, element("label", { for: input.id }, label), input));
  }
  byId("close-settings").addEventListener("click", () => byId("settings").close());
}

// Show the settings; `save` is called when the user has changed them.
export function openSettings(conversation, save) {
  const dialog = byId("settings");
  byId("system").value = conversation.system;
  byId("stop-texts").value = (conversation.sampling.stop ?? []).join("\n");
  for (const [name] of FIELDS) byId(`setting-${name}`).value = conversation.sampling[name] ?? "";
  dialog.querySelector("form").onsubmit = (event) => {
    event.preventDefault();
    conversation.system = byId("system").value;
    conversation.sampling = sampling();
    save();
    dialog.close();
  };
  dialog.showModal();
}

function sampling() {
  const found = {};
  for (const [name] of FIELDS) {
    const value = byId(`setting-${name}`).value;
    if (value !== "") found[name] = Number(value);
  }
  const stop = byId("stop-texts").value.split("\n").filter(Boolean);
  if (stop.length) found.stop = stop;
  return found;
}

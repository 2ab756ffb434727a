// Requests to the server, with the API key if it asks for one, and server-sent events.
import { byId } from "./dom.js";

const KEY = "mgpu.key";
let asking = null; // a promise while the dialog is open
let declined = false; // polls do not open the dialog again

async function askForKey(wasWrong) {
  asking ??= new Promise((resolve) => {
    const dialog = byId("key-dialog");
    const input = byId("key");
    byId("key-text").textContent = wasWrong
      ? "The server does not know this API key."
      : "This server asks for an API key. It is kept until this tab is closed.";
    input.value = "";
    input.setCustomValidity("");
    dialog.querySelector("form").onsubmit = (event) => {
      event.preventDefault();
      const key = input.value.trim();
      if (!/^[\x21-\x7e]+$/.test(key)) return; // anything else cannot stand in a header
      sessionStorage.setItem(KEY, key);
      declined = false;
      dialog.close("given");
    };
    byId("close-key").onclick = () => dialog.close();
    dialog.onclose = () => {
      asking = null;
      declined = dialog.returnValue !== "given";
      dialog.returnValue = "";
      resolve(!declined);
    };
    dialog.showModal();
  });
  return asking;
}

// Return the answer, whatever its status but 401. `isPoll`: nobody has clicked for it.
export async function request(path, options = {}, isPoll = false) {
  for (;;) {
    const key = sessionStorage.getItem(KEY);
    const headers = { ...options.headers, ...(key ? { authorization: `Bearer ${key}` } : {}) };
    const response = await fetch(path, { ...options, headers, cache: "no-store" });
    if (response.status !== 401) return response;
    if (sessionStorage.getItem(KEY) !== key) continue; // another request has asked meanwhile
    if ((isPoll && declined) || !(await askForKey(key !== null))) throw new Error("an API key is needed");
  }
}

// Post JSON and return the answer. An error of the server becomes an Error with its message.
export async function post(path, body, signal) {
  const headers = { "content-type": "application/json" };
  const response = await request(path, { method: "POST", headers, body: JSON.stringify(body), signal });
  if (response.ok) return response;
  let message = `the server answered ${response.status}`;
  try {
    message = (await response.json()).error.message;
  } catch { /* a proxy's page: the status has to do */ }
  throw new Error(message);
}

// Yield the JSON of each event up to [DONE].
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("the connection broke off");
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ")) continue;
      if (line === "data: [DONE]") return;
      const event = JSON.parse(line.slice(6));
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

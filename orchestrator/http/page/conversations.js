// Conversations, each under a key of its own in localStorage, so that two tabs do not overwrite each other's.

const PREFIX = "mgpu.conversation.";
const LAST = "mgpu.last";
const TITLE_CHARS = 60;

export function allConversations() {
  const found = [];
  for (let at = 0; at < localStorage.length; at += 1) {
    const key = localStorage.key(at);
    const conversation = key.startsWith(PREFIX) ? parsed(localStorage.getItem(key)) : null;
    if (conversation) found.push(conversation);
  }
  return found.sort((a, b) => b.updated - a.updated);
}

function parsed(text) {
  try {
    const found = JSON.parse(text);
    return typeof found.id === "string" && Array.isArray(found.messages) ? found : null;
  } catch {
    return null;
  }
}

// Return a conversation without messages, with the settings of another one.
export function newConversation(like = { system: "", sampling: {} }) {
  const id = `${Date.now().toString(36)}${Math.random().toString(36).slice(2)}`;
  return { id, updated: Date.now(), system: like.system, sampling: { ...like.sampling }, messages: [] };
}

// Raises where the browser has no room left.
export function save(conversation) {
  conversation.updated = Date.now();
  localStorage.setItem(PREFIX + conversation.id, JSON.stringify(conversation));
}

export const isKept = (conversation) => localStorage.getItem(PREFIX + conversation.id) !== null;

export function remove(conversation) {
  localStorage.removeItem(PREFIX + conversation.id);
}

export const lastId = () => localStorage.getItem(LAST);
export const setLastId = (id) => localStorage.setItem(LAST, id);

export function titleOf(conversation) {
  const first = conversation.messages.find((message) => message.role === "user");
  const text = first ? first.content.trim().replace(/\s+/g, " ") : "New conversation";
  return text.length > TITLE_CHARS ? `${text.slice(0, TITLE_CHARS)}…` : text;
}

// Renders the inline Markdown of one block: code, emphasis, links. One pass; what has no end is text.
import { element } from "./dom.js";

const MAX_DEPTH = 6;
const MARKS = [["**", "strong"], ["__", "strong"], ["~~", "del"], ["*", "em"], ["_", "em"]];
const SPECIAL = /[\\`*_~[!<\nh]/g;
const ADDRESS = /https?:\/\/[^\s<>"'`]*[^\s<>"'`.,:;!?)\]}*_]/y;
const LINK = /!?\[((?:\\.|[^\]\\\n]){0,500})\]\(\s{0,4}<?([^\s<>()]{0,2000}(?:\([^\s<>()]{0,500}\)[^\s<>()]{0,500})?)>?(?:\s+"[^"\n]{0,500}")?\s{0,4}\)/y;
const ANGLED = /<(https?:\/\/[^\s<>]{1,2000})>/y;

// Return the nodes of a text.
export function inline(text, depth = 0) {
  const nodes = [];
  let plain = "";
  const add = (node) => {
    if (plain) nodes.push(plain);
    plain = "";
    nodes.push(node);
  };
  const missing = new Set(); // marks of which the rest of the text has no end
  let at = 0;
  while (at < text.length) {
    SPECIAL.lastIndex = at;
    const next = SPECIAL.exec(text)?.index ?? text.length;
    plain += text.slice(at, next);
    at = next;
    if (at >= text.length) break;
    const found = special(text, at, depth, missing);
    if (found === null) plain += text[at];
    else if (typeof found.node === "string") plain += found.node;
    else add(found.node);
    at = found?.end ?? at + 1;
  }
  if (plain) nodes.push(plain);
  return nodes;
}

// Return what begins at `at`, and where it ends; null if that is a plain character.
function special(text, at, depth, missing) {
  const char = text[at];
  if (char === "\\") return escaped(text, at);
  if (char === "\n") return { node: element("br"), end: at + 1 };
  if (char === "`") return code(text, at, missing);
  if (char === "[" || char === "!") return link(text, at, depth);
  if (char === "<") return address(ANGLED, text, at, 1);
  if (char === "h") return /\w/.test(text[at - 1] ?? "") ? null : address(ADDRESS, text, at, 0);
  return depth < MAX_DEPTH ? emphasis(text, at, depth, missing) : null;
}

function escaped(text, at) {
  const next = text[at + 1] ?? "";
  return /[!-/:-@[-`{-~]/.test(next) ? { node: next, end: at + 2 } : null;
}

function code(text, at, missing) {
  let width = 1;
  while (text[at + width] === "`") width += 1;
  const mark = "`".repeat(width);
  const none = { node: mark, end: at + width };
  if (missing.has(mark)) return none;
  let end = text.indexOf(mark, at + width);
  while (end >= 0 && (text[end + width] === "`" || text[end - 1] === "`")) end = text.indexOf(mark, end + 1);
  if (end < 0) {
    missing.add(mark);
    return none;
  }
  const inner = text.slice(at + width, end).replaceAll("\n", " ");
  const shown = /^ .*\S.* $/.test(inner) ? inner.slice(1, -1) : inner;
  return { node: element("code", {}, shown), end: end + width };
}

function emphasis(text, at, depth, missing) {
  for (const [mark, name] of MARKS) {
    if (!text.startsWith(mark, at) || missing.has(mark)) continue;
    const start = at + mark.length;
    const isInWord = mark[0] === "_" && /\w/.test(text[at - 1] ?? "");
    if (isInWord || !/\S/.test(text[start] ?? "")) continue;
    const end = endOfEmphasis(text, start, mark);
    if (end < 0) {
      missing.add(mark);
      continue;
    }
    return { node: element(name, {}, ...inline(text.slice(start, end), depth + 1)), end: end + mark.length };
  }
  return null;
}

function endOfEmphasis(text, start, mark) {
  for (let end = text.indexOf(mark, start + 1); end >= 0; end = text.indexOf(mark, end + 1)) {
    const before = text[end - 1];
    const after = text[end + mark.length] ?? "";
    if (/\s/.test(before) || before === "\\" || (mark[0] === "_" && /\w/.test(after))) continue;
    if (mark.length === 1 && (after === mark || before === mark)) {
      end += after === mark ? 1 : 0;
      continue; // part of a double mark
    }
    return end;
  }
  return -1;
}

function link(text, at, depth) {
  LINK.lastIndex = at;
  const found = LINK.exec(text);
  if (!found || depth >= MAX_DEPTH) return null;
  const [whole, label, target] = found;
  const shown = label || target;
  if (!/^(https?:|mailto:)/i.test(target)) return { node: whole, end: at + whole.length };
  return { node: anchor(target, inline(shown, MAX_DEPTH)), end: at + whole.length };
}

function address(kind, text, at, angles) {
  kind.lastIndex = at;
  const found = kind.exec(text);
  if (!found) return null;
  const target = angles ? found[1] : found[0];
  return { node: anchor(target, [target]), end: at + found[0].length };
}

function anchor(target, children) {
  return element("a", { href: target, target: "_blank", rel: "noopener noreferrer" }, ...children);
}

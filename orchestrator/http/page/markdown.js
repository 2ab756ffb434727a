// Renders Markdown into nodes. Images are links and HTML is text: the page asks no other server for anything.
import { copyText, element } from "./dom.js";
import { inline } from "./inline.js";

const MAX_DEPTH = 8; // of quotes and lists in each other; deeper ones are text
const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^`\s]*)[^`]*$/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*)$/;
const RULE = /^ {0,3}([-*_])(?: *\1){2,} *$/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])( +|$)/;
const QUOTE = /^ {0,3}> ?/;
const TABLE_RULE = /^ {0,3}\|?(?: *:?-+:? *\|)+ *(?::?-+:?)? *$/;

// Make `node` show the text. Blocks that are as they were keep their nodes, so a selection in them survives a stream.
export function renderMarkdown(node, text) {
  const blocks = split(text.split("\n"));
  const known = node.renderedBlocks ?? [];
  let same = 0;
  while (same < blocks.length && same < known.length && blocks[same].join("\n") === known[same]) same += 1;
  while (node.childNodes.length > same) node.lastChild.remove();
  for (const lines of blocks.slice(same)) node.append(block(lines, 0));
  node.renderedBlocks = blocks.map((lines) => lines.join("\n"));
}

// Return the blocks, each with its lines.
function split(lines) {
  const blocks = [];
  let at = 0;
  while (at < lines.length) {
    if (!lines[at].trim()) {
      at += 1;
      continue;
    }
    const end = endOfBlock(lines, at);
    blocks.push(lines.slice(at, end));
    at = end;
  }
  return blocks;
}

function endOfBlock(lines, at) {
  const first = lines[at];
  if (FENCE.test(first)) return endOfFence(lines, at);
  if (HEADING.test(first) || RULE.test(first)) return at + 1;
  if (ITEM.test(first)) return endOfList(lines, at);
  const isQuote = QUOTE.test(first);
  const belongs = (end) => (isQuote ? QUOTE.test(lines[end]) : !beginsBlock(lines[end]) && !beginsTable(lines, end));
  let end = at + 1;
  while (end < lines.length && lines[end].trim() && belongs(end)) end += 1;
  return end;
}

function endOfFence(lines, at) {
  const mark = FENCE.exec(lines[at])[1];
  for (let end = at + 1; end < lines.length; end += 1) {
    const line = lines[end].trim();
    if (line.startsWith(mark) && line === mark[0].repeat(line.length)) return end + 1;
  }
  return lines.length;
}

// A list goes on while lines are items, are indented, or follow an item without an empty line.
function endOfList(lines, at) {
  const isOrdered = /\d/.test(ITEM.exec(lines[at])[2]);
  let end = at + 1;
  for (; end < lines.length; end += 1) {
    const line = lines[end];
    if (!line.trim() || /^ {2,}/.test(line)) continue;
    const item = RULE.test(line) ? null : ITEM.exec(line);
    if (item ? /\d/.test(item[2]) !== isOrdered : !lines[end - 1].trim() || beginsBlock(line)) break;
  }
  while (!lines[end - 1].trim()) end -= 1;
  return end;
}

const beginsTable = (lines, at) => lines[at].includes("|") && TABLE_RULE.test(lines[at + 1] ?? "");
const beginsBlock = (line) => [FENCE, HEADING, RULE, ITEM, QUOTE].some((kind) => kind.test(line));

function block(lines, depth) {
  const [first] = lines;
  if (FENCE.test(first)) return codeBlock(lines);
  if (HEADING.test(first)) {
    const [, marks, text] = HEADING.exec(first);
    return element(`h${Math.min(6, marks.length + 2)}`, {}, ...inline(text.replace(/\s+#+\s*$/, "")));
  }
  if (RULE.test(first)) return element("hr");
  if (depth < MAX_DEPTH && QUOTE.test(first)) return quote(lines, depth);
  if (depth < MAX_DEPTH && ITEM.test(first)) return list(lines, depth);
  if (beginsTable(lines, 0)) return table(lines);
  return element("p", {}, ...inline(lines.map((line) => line.trimStart()).join("\n")));
}

function codeBlock(lines) {
  const [, mark, language] = FENCE.exec(lines[0]);
  const last = lines.length > 1 ? lines.at(-1).trim() : "";
  const isClosed = last.startsWith(mark) && last === mark[0].repeat(last.length);
  const text = lines.slice(1, isClosed ? -1 : undefined).join("\n");
  const button = element("button", { type: "button", onclick: () => copyText(text, button) }, "Copy");
  const head = element("div", { class: "code-head" }, element("span", {}, language || "code"), button);
  const code = element("pre", { tabindex: "0", "aria-label": "Code" }, element("code", {}, text));
  return element("div", { class: "code" }, head, code);
}

function quote(lines, depth) {
  const inner = split(lines.map((line) => line.replace(QUOTE, "")));
  return element("blockquote", {}, ...inner.map((each) => block(each, depth + 1)));
}

function list(lines, depth) {
  const [, indent, marker] = ITEM.exec(lines[0]);
  const items = [];
  for (const line of lines) {
    const item = RULE.test(line) ? null : ITEM.exec(line);
    if (item && item[1].length <= indent.length + 1) items.push({ width: item[0].length, lines: [line.slice(item[0].length)] });
    else items.at(-1).lines.push(line.slice(Math.min(items.at(-1).width, line.search(/\S|$/))));
  }
  const isOrdered = /\d/.test(marker);
  const node = element(isOrdered ? "ol" : "ul", isOrdered ? { start: String(parseInt(marker, 10)) } : {});
  for (const item of items) {
    const blocks = split(item.lines).map((each) => block(each, depth + 1));
    const isTight = blocks.length > 0 && blocks[0].localName === "p";
    node.append(element("li", {}, ...(isTight ? [...blocks[0].childNodes, ...blocks.slice(1)] : blocks)));
  }
  return node;
}

function table(lines) {
  const sides = cells(lines[1]).map((cell) => (cell.endsWith(":") ? (cell.startsWith(":") ? "center" : "right") : "left"));
  const row = (line, name) => element("tr", {}, ...cells(line).slice(0, sides.length)
    .map((cell, at) => element(name, { class: sides[at] }, ...inline(cell))));
  const head = element("thead", {}, row(lines[0], "th"));
  const rows = element("tbody", {}, ...lines.slice(2).map((line) => row(line, "td")));
  return element("div", { class: "table", tabindex: "0", role: "group", "aria-label": "Table" }, element("table", {}, head, rows));
}

function cells(line) {
  const found = line.trim().replace(/^\|/, "").replace(/(?<!\\)\|$/, "").split(/(?<!\\)\|/);
  return found.map((cell) => cell.trim().replaceAll("\\|", "|"));
}

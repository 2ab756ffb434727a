// The view of the server: asked every two seconds while the page can be seen.
import { request } from "./api.js";
import { byId, element } from "./dom.js";

const EVERY_MS = 2000;
const SPAN_MS = 300_000;
const WIDTH = 600;
const HEIGHT = 150;
const samples = []; // {at, rate}
const changes = []; // {at, from, to}
let state = "";

export async function startStatus() {
  for (;;) {
    if (!document.hidden) await update();
    await new Promise((resolve) => setTimeout(resolve, EVERY_MS));
  }
}

async function update() {
  let found = { state: "unreachable", stats: {} };
  try {
    const response = await request("status", {}, true);
    if (response.ok) found = await response.json();
  } catch (error) {
    if (!(error instanceof TypeError)) found.state = "key needed";
  }
  const now = Date.now();
  if (state && state !== found.state) changes.unshift({ at: now, from: state, to: found.state });
  changes.splice(50);
  state = found.state;
  samples.push({ at: now, rate: found.stats.tokens_per_s ?? 0 });
  while (samples[0].at < now - SPAN_MS) samples.shift();
  show(found, now);
}

function show(found, now) {
  byId("state").textContent = found.state;
  byId("state").className = found.state === "ready" ? "good" : "bad";
  if (found.model) byId("model").textContent = found.model;
  showLine(now);
  showChanges(found);
  if (found.uptime_s === undefined) return; // not reached: the last numbers stay
  showNumbers(found);
  showBars(found.stats);
  byId("layout").textContent = found.layout;
}

function showLine(now) {
  const top = Math.max(10, ...samples.map((each) => each.rate)) * 1.05;
  const x = (at) => (WIDTH * (1 - (now - at) / SPAN_MS)).toFixed(1);
  const y = (rate) => (HEIGHT - (HEIGHT * rate) / top).toFixed(1);
  byId("points").setAttribute("points", samples.map((each) => `${x(each.at)},${y(each.rate)}`).join(" "));
  byId("recoveries").replaceChildren(...changes.filter((each) => each.at > now - SPAN_MS).map((each) => {
    const line = document.createElementNS("http://www.w3.org/2000/svg", "line");
    const place = { x1: x(each.at), x2: x(each.at), y1: 0, y2: HEIGHT };
    for (const [name, value] of Object.entries(place)) line.setAttribute(name, value);
    return line;
  }));
  byId("speed-now").textContent = number(samples.at(-1).rate);
  byId("speed-top").textContent = `top of the graph: ${number(top)}`;
}

function showNumbers(found) {
  const { stats } = found;
  const rows = {
    Running: number(found.running),
    Waiting: number(found.waiting),
    Connections: number(found.connections),
    "Prompt tokens/s": number(stats.prompt_tokens_per_s ?? 0),
    "Generated tokens": number(stats.generated_tokens ?? 0),
    "Prompt tokens": number(stats.prompt_tokens ?? 0),
    "Of these cached": share(stats.prefix_hit_tokens, stats.prompt_tokens),
    Context: `${number(found.max_seq_len)} tokens`,
    Up: duration(found.uptime_s),
    Version: found.version,
  };
  const nodes = Object.entries(rows).map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, value)));
  byId("numbers").replaceChildren(...nodes);
}

function showBars(stats) {
  const { kv_blocks_used: used = 0, kv_blocks_total: total = 0 } = stats;
  byId("kv").replaceChildren(bar("KV cache", used, total, `${number(used)} of ${number(total)} blocks`));
  const gpus = Object.keys(stats).map((name) => /^gpu(\d+)_memory_total_bytes$/.exec(name)?.[1]).filter((each) => each !== undefined);
  byId("memory-section").hidden = gpus.length === 0;
  byId("memory").replaceChildren(...gpus.sort((a, b) => a - b).map((gpu) => {
    const [has, all] = ["used", "total"].map((kind) => stats[`gpu${gpu}_memory_${kind}_bytes`] ?? 0);
    return bar(`GPU ${gpu}`, has, all, `GPU ${gpu}: ${gib(has)} of ${gib(all)} GiB`);
  }));
}

function bar(name, used, total, text) {
  const progress = element("progress", { max: total || 1, value: used, "aria-label": name });
  return element("div", { class: "bar" }, progress, element("span", {}, `${text} (${share(used, total)})`));
}

function showChanges(found) {
  if (found.restarts !== undefined) {
    const times = (count, what) => `${what} replaced ${count === 1 ? "once" : `${number(count)} times`}`;
    const last = found.restarts ? `, the last time within ${found.last_recovery_s.toFixed(1)} s` : "";
    byId("restarts").textContent = `Workers ${times(found.restarts, "were")}${last}; the gateway ${times(found.stats.gateway_restarts ?? 0, "was")}.`;
  }
  byId("changes").replaceChildren(...changes.map((each) => {
    const when = new Date(each.at).toLocaleTimeString();
    return element("li", {}, `${when}: ${each.from} → ${each.to}`);
  }));
}

const number = (value) => value.toLocaleString("en", { maximumFractionDigits: value < 10 ? 1 : 0 });
const gib = (bytes) => (bytes / 2 ** 30).toFixed(1);
const share = (part = 0, whole = 0) => (whole ? `${((100 * part) / whole).toFixed(0)} %` : "–");

function duration(seconds) {
  const [days, hours, minutes] = [seconds / 86400, (seconds / 3600) % 24, (seconds / 60) % 60].map(Math.floor);
  return days ? `${days} d ${hours} h` : hours ? `${hours} h ${minutes} min` : minutes ? `${minutes} min` : `${Math.floor(seconds)} s`;
}

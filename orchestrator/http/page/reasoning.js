// Splits an answer into what the model thought and what it says.

const OPEN = "<think>";
const CLOSE = "</think>";

// Return {reasoning, text, isThinking}. A template may have written the opening tag into the prompt.
export function splitReasoning(content, reasoning = "") {
  const close = content.indexOf(CLOSE);
  const begun = content.trimStart().startsWith(OPEN);
  if (close < 0 && !begun) {
    const isPart = content.trim() !== "" && OPEN.startsWith(content.trim());
    return { reasoning, text: isPart ? "" : content, isThinking: Boolean(reasoning) && !content };
  }
  const start = begun ? content.indexOf(OPEN) + OPEN.length : 0;
  const thought = content.slice(start, close < 0 ? undefined : close).trim();
  const text = close < 0 ? "" : content.slice(close + CLOSE.length).trimStart();
  return { reasoning: [reasoning, thought].filter(Boolean).join("\n\n"), text, isThinking: close < 0 };
}

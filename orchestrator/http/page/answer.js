// Streams one answer of the server into a message of a conversation.
import { events, post } from "./api.js";
import { splitReasoning } from "./reasoning.js";

// Ask for the answer to the conversation; `changed` is called after each piece. What fails stands in the message.
export async function streamAnswer(conversation, message, signal, changed) {
  const speed = new Speed();
  try {
    const response = await post("v1/chat/completions", bodyOf(conversation, message), signal);
    for await (const chunk of events(response)) {
      const delta = chunk.choices[0]?.delta ?? {};
      const thought = delta.reasoning_content ?? delta.reasoning ?? "";
      message.content += delta.content ?? "";
      message.reasoning += thought;
      if (delta.content || thought) speed.count();
      if (chunk.choices[0]?.finish_reason === "length") message.note = "cut off: no tokens left";
      if (chunk.usage) speed.tokens = chunk.usage.completion_tokens;
      message.speed = speed.text();
      changed();
    }
  } catch (error) {
    if (signal.aborted) message.note = "stopped";
    else message.error = error instanceof TypeError ? "the server cannot be reached" : error.message;
  }
}

function bodyOf(conversation, message) {
  const system = conversation.system.trim() ? [{ role: "system", content: conversation.system }] : [];
  const said = conversation.messages.filter((each) => each !== message && (each.role === "user" || each.content));
  const messages = said.map(({ role, content }) => ({
    role, content: role === "assistant" ? splitReasoning(content).text : content, // thoughts are not sent back
  }));
  const options = { stream: true, stream_options: { include_usage: true } };
  return { ...conversation.sampling, ...options, messages: [...system, ...messages] };
}

class Speed {
  pieces = 0;
  tokens = 0; // as the server counts them, at the end

  count() {
    this.pieces += 1;
    this.last = performance.now();
    this.first ??= this.last;
  }

  // Return tokens per second after the first one. Until the end a piece counts as a token, which is nearly so.
  text() {
    const count = this.tokens || this.pieces;
    const seconds = (this.last - this.first) / 1000;
    if (count < 2 || !(seconds > 0)) return "";
    const rate = (count - 1) / seconds;
    return `${this.tokens ? "" : "≈ "}${rate.toFixed(rate < 10 ? 1 : 0)} tokens/s, ${count} tokens`;
  }
}

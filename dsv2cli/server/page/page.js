// A conversation in the browser: plain functions over one list of messages, which is what the server is sent.
"use strict";

const $ = (id) => document.getElementById(id);
const messages = []; // {role, content, reasoning, failed}
let writing = null; // the AbortController of the answer that is being written
let context = 0; // tokens that the server's context holds

function headers() {
  const key = $("key").value;
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

function element(name, text, more = {}) {
  return Object.assign(document.createElement(name), { textContent: text }, more);
}

function button(text, act) {
  const made = element("button", text, { type: "button" });
  made.addEventListener("click", act);
  return made;
}

function shown(message, index) {
  const article = element("article", "");
  article.classList.toggle("failed", Boolean(message.failed));
  article.append(element("h2", message.role === "user" ? "You" : "Model"));
  if (message.reasoning) {
    const details = element("details", "");
    details.append(element("summary", "Reasoning"), element("div", message.reasoning));
    article.append(details);
  }
  article.append(element("div", message.content, { className: "said" }));
  if (!writing) {
    if (message.role === "user") article.append(button("Edit", () => edit(index)));
    else if (index === messages.length - 1) article.append(button("Again", again));
  }
  return article;
}

function draw() {
  const turns = $("turns");
  const atEnd = turns.scrollHeight - turns.scrollTop - turns.clientHeight < 40;
  turns.replaceChildren(...messages.map(shown));
  if (atEnd) turns.scrollTop = turns.scrollHeight;
  $("send").hidden = Boolean(writing);
  $("stop").hidden = !writing;
}

// Only the last turn changes while it is written.
function drawLast() {
  const turns = $("turns");
  const atEnd = turns.scrollHeight - turns.scrollTop - turns.clientHeight < 40;
  const open = turns.lastElementChild?.querySelector("details")?.open;
  turns.lastElementChild.replaceWith(shown(messages.at(-1), messages.length - 1));
  const details = turns.lastElementChild.querySelector("details");
  if (details && open) details.open = true;
  if (atEnd) turns.scrollTop = turns.scrollHeight;
}

function edit(index) {
  $("text").value = messages[index].content;
  messages.length = index;
  draw();
  $("text").focus();
}

function again() {
  messages.pop();
  answer();
}

function request() {
  const system = $("system").value.trim();
  const told = messages.filter((m) => !m.failed).map(({ role, content }) => ({ role, content }));
  return {
    messages: system ? [{ role: "system", content: system }, ...told] : told,
    temperature: Number($("temperature").value),
    ...($("limit").value ? { max_tokens: Number($("limit").value) } : {}),
    stream: true,
    stream_options: { include_usage: true },
  };
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    held += value;
    const lines = held.split("\n");
    held = lines.pop();
    for (const line of lines) if (line.startsWith("data: {")) yield JSON.parse(line.slice(6));
  }
}

function take(chunk, message) {
  if (chunk.error) throw new Error(chunk.error.message);
  const delta = chunk.choices[0]?.delta ?? {};
  message.content += delta.content ?? "";
  message.reasoning += delta.reasoning_content ?? "";
  const timings = chunk.timings;
  if (timings) $("figures").textContent = `${timings.predicted_n} tokens, ${timings.predicted_per_second.toFixed(1)} a second`;
  if (chunk.usage) $("fill").value = context ? chunk.usage.total_tokens / context : 0;
}

async function answer() {
  writing = new AbortController();
  const asked = request();
  const message = { role: "assistant", content: "", reasoning: "" };
  messages.push(message);
  draw();
  $("figures").textContent = "reading …";
  try {
    const response = await fetch("/v1/chat/completions", {
      method: "POST",
      headers: headers(),
      body: JSON.stringify(asked),
      signal: writing.signal,
    });
    if (!response.ok) throw new Error((await response.json()).error.message);
    for await (const chunk of events(response)) {
      take(chunk, message);
      drawLast();
    }
  } catch (error) {
    if (error.name === "AbortError") $("figures").textContent = "stopped";
    else Object.assign(message, { content: error.message, failed: true });
  }
  writing = null;
  draw();
  $("text").focus();
}

function send(event) {
  event?.preventDefault();
  const text = $("text").value;
  if (writing || !text.trim()) return;
  messages.push({ role: "user", content: text });
  $("text").value = "";
  answer();
}

function stop() {
  writing?.abort();
}

async function begin() {
  $("key").value = sessionStorage.getItem("key") ?? "";
  try {
    const response = await fetch("/v1/models", { headers: headers() });
    const body = await response.json();
    if (!response.ok) throw new Error(body.error.message);
    $("model").textContent = document.title = body.data[0].id;
    context = body.data[0].max_model_len;
  } catch (error) {
    $("figures").textContent = error.message;
  }
}

$("ask").addEventListener("submit", send);
$("stop").addEventListener("click", stop);
$("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) send(event);
});
document.addEventListener("keydown", (event) => event.key === "Escape" && stop());
$("clear").addEventListener("click", () => {
  stop();
  messages.length = 0;
  $("fill").value = 0;
  draw();
  $("text").focus();
});
$("settings").addEventListener("click", () => {
  $("options").hidden = !$("options").hidden;
  $("settings").setAttribute("aria-expanded", String(!$("options").hidden));
});
$("key").addEventListener("change", () => {
  sessionStorage.setItem("key", $("key").value);
  begin();
});
begin();

// The playground: answers as they come, of one model or two at once. Without it the form is sent, and comes back whole.
// All that a model says is text, never HTML.
"use strict";
(() => {
  const ask = () => document.getElementById("ask");
  if (!ask()) return;
  const results = document.getElementById("results");
  const told = document.getElementById("told");
  const send = () => document.getElementById("send");
  const stop = () => document.getElementById("end");
  let running = [], numbered = 0;

  // --- Whom to ask: the URL says it, and what was typed stays.
  async function choose(form) {
    const query = new URLSearchParams([...new FormData(form)].filter(([, value]) => value !== ""));
    // Versions are those of a prompt.
    const before = new URLSearchParams(location.search);
    if (before.get("prompt") !== query.get("prompt")) query.delete("version");
    const url = `${form.action}?${query}`;
    let page;
    try {
      const answer = await fetch(url, { redirect: "error" });
      if (!answer.ok) throw new Error(answer.status);
      page = new DOMParser().parseFromString(await answer.text(), "text/html");
    } catch {
      location.href = url;
      return;
    }
    const focused = document.activeElement?.id;
    for (const id of ["choice", "stored"]) {
      const found = page.getElementById(id);
      if (!found) { location.href = url; return; }
      document.getElementById(id).replaceWith(document.adoptNode(found));
    }
    const made = page.getElementById("ask");
    ask().action = made.getAttribute("action");
    ask().dataset.models = made.dataset.models;
    document.getElementById("play").className = page.getElementById("play").className;
    history.replaceState(null, "", url);
    watch();
    document.getElementById(focused)?.focus();
  }
  // At the start the console's own script does it.
  function watch() {
    document.querySelectorAll("#choice select").forEach((one) => one.addEventListener("change", () => one.form.requestSubmit()));
  }
  document.addEventListener("submit", (event) => {
    const form = event.target;
    if (form.id === "choice") { event.preventDefault(); event.stopImmediatePropagation(); choose(form); }
    else if (form.id === "ask") act(event);
    else if (form.dataset.is === "next") goOn(event);
  }, true);
  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && event.target.form === ask() && !send().disabled) {
      event.preventDefault();
      ask().requestSubmit(send());
    }
  });

  // --- Messages
  function addTurn(role, content) {
    const made = document.getElementById("turn").content.cloneNode(true);
    const suffix = `more-${++numbered}`;
    for (const one of made.querySelectorAll("[id]")) one.id = one.id.replace("new", suffix);
    for (const one of made.querySelectorAll("label")) one.htmlFor = one.htmlFor.replace("new", suffix);
    made.querySelector("select").value = role;
    const area = made.querySelector("textarea");
    area.value = content;
    document.getElementById("turns").append(made);
    return area;
  }
  function goOn(event) {
    event.preventDefault();
    event.stopImmediatePropagation();
    addTurn("assistant", event.target.closest(".lane").querySelector("[data-is=text]").textContent);
    addTurn("user", "").focus();
  }
  function act(event) {
    event.preventDefault();
    event.stopImmediatePropagation();
    const what = event.submitter?.value ?? "send";
    if (what === "turn") addTurn("user", "").focus();
    else if (what === "code") showCode();
    else if (!running.length) sendAll();
  }
  async function showCode() {
    const body = new URLSearchParams(new FormData(ask()));
    body.set("do", "code");
    const place = document.getElementById("code");
    try {
      const answer = await fetch(ask().action, { method: "POST", body, redirect: "error" });
      const page = new DOMParser().parseFromString(await answer.text(), "text/html");
      const found = page.getElementById("code");
      if (answer.ok && found?.childElementCount) {
        place.replaceWith(document.adoptNode(found));
        found.querySelectorAll("[data-copy]").forEach((one) => { one.hidden = false; });
        found.scrollIntoView({ block: "nearest" });
      } else {
        consoleSay(page.querySelector(".problem")?.textContent.trim() || `The console answers ${answer.status}.`);
      }
    } catch {
      consoleSay("The control plane does not answer.");
    }
  }

  // --- Answers
  class Lane {
    constructor(model) {
      this.model = model;
      this.root = document.getElementById("lane").content.firstElementChild.cloneNode(true);
      this.root.setAttribute("aria-label", `Answer of ${model}`);
      this.root.querySelector("h2").textContent = model;
      this.begin = performance.now();
      this.text = "";
      this.usage = null;
      this.first = this.problem = this.finish = this.answered = this.id = null;
      this.ended = this.stopped = false;
      this.abort = new AbortController();
      results.append(this.root);
    }
    at(name) { return this.root.querySelector(`[data-is=${name}]`); }
    state(word, kind) {
      const place = this.at("state");
      place.textContent = word;
      place.className = `state ${kind}`;
    }
    fail(message, code) {
      this.problem = message;
      const place = this.at("problem");
      place.textContent = message;
      if (code) {
        const shown = document.createElement("code");
        shown.textContent = code;
        place.append(" ", shown);
      }
      place.hidden = false;
    }
    async run(body) {
      const url = new URL(ask().action, location.href);
      url.searchParams.set("model", this.model);
      url.searchParams.delete("model2");
      this.tick = setInterval(() => { this.at("took").textContent = ms(performance.now() - this.begin); }, 100);
      try {
        const answer = await fetch(url, {
          method: "POST", body, redirect: "manual", signal: this.abort.signal,
          headers: { Accept: "text/event-stream, application/json" },
        });
        this.id = answer.headers.get("x-request-id");
        if (answer.type === "opaqueredirect") this.fail("You are signed out. Sign in again in another tab, then send it again.");
        else if (!answer.ok) await this.refused(answer);
        else if (answer.headers.get("content-type")?.startsWith("text/event-stream")) await this.read(answer.body);
        else { this.take(await answer.json()); this.ended = true; }
      } catch (error) {
        if (this.abort.signal.aborted) this.stopped = true;
        else this.fail(this.text ? "The answer broke off." : "The control plane does not answer.");
      } finally {
        clearInterval(this.tick);
        this.end();
      }
    }
    async refused(answer) {
      let found = {};
      try { found = (await answer.json()).error ?? {}; } catch { /* no JSON: the status says it */ }
      const wait = answer.headers.get("retry-after");
      this.fail((found.message ?? `The console answers ${answer.status}.`) + (wait ? ` Try again in ${wait} s.` : ""), found.code);
    }
    async read(stream) {
      const decoder = new TextDecoder();
      const reader = stream.getReader();
      let rest = "";
      for (;;) {
        const { done, value } = await reader.read();
        rest += done ? decoder.decode() : decoder.decode(value, { stream: true });
        const lines = rest.split("\n");
        rest = done ? "" : lines.pop();
        for (const line of lines) if (line.startsWith("data:")) this.event(line.slice(5).trim());
        if (done) return;
      }
    }
    event(data) {
      if (data === "[DONE]") { this.ended = true; return; }
      let found;
      try { found = JSON.parse(data); } catch { return; }
      this.take(found);
    }
    take(found) {
      if (found?.error) this.fail(found.error.message ?? "The answer ended with an error.", found.error.code);
      if (found?.model) this.at("model").textContent = this.answered = found.model;
      if (found?.usage) this.usage = found.usage;
      for (const choice of found?.choices ?? []) {
        const part = choice.delta ?? choice.message ?? {};
        const thought = part.reasoning_content || part.reasoning || "";
        let said = part.content || part.refusal || "";
        for (const call of part.tool_calls ?? []) said += `${JSON.stringify(call)}\n`;
        if (choice.finish_reason) this.at("finish").textContent = this.finish = choice.finish_reason;
        if ((said || thought) && this.first === null) {
          this.first = performance.now() - this.begin;
          this.at("first").textContent = ms(this.first);
          this.state("answers", "info");
        }
        if (thought) { this.at("thought").hidden = false; this.at("reasoning").append(thought); }
        if (said) { this.text += said; this.at("text").append(said); }
      }
    }
    end() {
      this.took = performance.now() - this.begin;
      this.at("took").textContent = ms(this.took);
      const whole = this.ended || this.finish;
      if (!this.problem && !this.stopped && !whole) this.fail("The answer broke off before its end.");
      if (this.problem) this.state("failed", "bad");
      else if (this.stopped) this.state("stopped", "warn");
      else this.state("done", "ok");
      const { prompt_tokens: input, completion_tokens: output } = this.usage ?? {};
      this.tokens({ input, output });
      if (output && this.first !== null && this.took > this.first) {
        const speed = output * 1000 / (this.took - this.first);
        this.at("speed").textContent = `${speed < 100 ? speed.toFixed(1) : speed.toFixed(0)} tokens/s`;
      }
      if (this.text) this.at("next").hidden = false;
      if (this.id) {
        const link = document.createElement("a");
        link.className = "id";
        link.href = `/console/requests?id=${encodeURIComponent(this.id)}`;
        link.textContent = this.id;
        this.at("request").replaceChildren(link);
        this.cost([0, 4000, 8000, 15000]);
      }
    }
    tokens(counts) {
      for (const [name, count] of Object.entries(counts))
        if (Number.isInteger(count)) this.at(name).textContent = count.toLocaleString("en");
    }
    // By the price at first; then of the usage record, which comes some seconds later.
    cost([wait, ...later]) {
      setTimeout(async () => {
        const query = new URLSearchParams({ answer: this.id, model: this.model, by: this.answered ?? "" });
        const { prompt_tokens: input, completion_tokens: output, prompt_tokens_details: details } = this.usage ?? {};
        for (const [name, value] of Object.entries({ input, output, cached: details?.cached_tokens }))
          if (Number.isInteger(value)) query.set(name, value);
        try {
          const answer = await fetch(`/console/playground?${query}`, { headers: { Accept: "application/json" }, redirect: "error" });
          const found = await answer.json();
          if (!answer.ok) return;
          this.at("cost").textContent = found.cost;
          // Of an answer that was stopped only the router knows them.
          this.tokens({ input: found.input, output: found.output });
          this.at("cost").title = found.recorded ? "of the usage record" : "by the price of the model; the usage record is not here yet";
          if (!found.recorded && later.length && this.root.isConnected) this.cost(later);
        } catch { /* The cost stays unknown. */ }
      }, wait);
    }
  }
  async function sendAll() {
    const body = new URLSearchParams(new FormData(ask()));
    const models = JSON.parse(ask().dataset.models);
    results.replaceChildren();
    running = models.map((model) => new Lane(model));
    told.textContent = `Asked ${models.join(" and ")}.`;
    busy(true);
    await Promise.all(running.map((lane) => lane.run(body)));
    // Read out as a whole, not word by word.
    told.textContent = running.map((lane) => `${lane.model}: ${lane.problem ?? (lane.stopped ? "stopped" : lane.text)}`).join("\n");
    running = [];
    busy(false);
  }
  function busy(is) {
    const focused = document.activeElement;
    stop().hidden = !is;
    send().disabled = is;
    if (is && focused === send()) stop().focus();
    if (!is && (focused === stop() || focused === document.body)) send().focus();
  }
  stop().addEventListener("click", () => running.forEach((lane) => lane.abort.abort()));
  const ms = (value) => value < 999.5 ? `${value.toFixed(0)} ms` : value < 60000 ? `${(value / 1000).toFixed(value < 9995 ? 2 : 1)} s` : `${(value / 60000).toFixed(1)} min`;
})();

// Follows a log: its last lines, then each that comes. Lines are text, never HTML or orders for a terminal.
"use strict";
(() => {
  const MOST = 5000;
  const button = document.getElementById("follow");
  if (!button) return;
  const log = document.getElementById("log");
  const told = document.getElementById("followed");
  const ORDERS = /\x1b(?:\[[0-?]*[ -\/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\-_])/g;
  const UNSEEN = /[\x00-\x08\x0a-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]/g;
  const seen = (found) => {
    const code = found.charCodeAt(0);
    return code < 256 ? `\\x${code.toString(16).padStart(2, "0")}` : `\\u${code.toString(16)}`;
  };
  let source = null, waiting = [], drawn = 0, wanted = false;

  function say(text) {
    told.textContent = text;
    told.hidden = !text;
  }
  function show() {
    button.textContent = source ? "Pause" : "Follow";
    button.setAttribute("aria-pressed", String(Boolean(source)));
  }
  function end(text) {
    source?.close();
    source = null;
    say(text);
    show();
  }
  // Many lines at once are drawn once.
  function draw() {
    drawn = 0;
    const below = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
    const lines = waiting.splice(0).slice(-MOST).map((line) => {
      const span = document.createElement("span");
      span.textContent = `${line.replace(ORDERS, "").replace(UNSEEN, seen)}\n`;
      return span;
    });
    log.hidden = false;
    log.append(...lines);
    while (log.childElementCount > MOST) log.firstElementChild.remove();
    // Whoever has scrolled up reads there.
    if (below) log.scrollTop = log.scrollHeight;
  }
  function take(line) {
    waiting.push(line);
    if (waiting.length > 2 * MOST) waiting.splice(0, MOST);
    drawn ||= requestAnimationFrame(draw);
  }
  function start() {
    log.replaceChildren();
    waiting = [];
    source = new EventSource(button.dataset.url);
    source.addEventListener("line", (event) => take(JSON.parse(event.data)));
    source.addEventListener("end", (event) => { wanted = false; end(JSON.parse(event.data).why); });
    source.addEventListener("error", (event) => {
      wanted = false;
      end(event.data ? JSON.parse(event.data).error.message : "The control plane does not answer: follow it again.");
    });
    say("Following: new lines appear at the end.");
    show();
  }
  button.hidden = false;
  show();
  log.scrollTop = log.scrollHeight;
  button.addEventListener("click", () => {
    wanted = !source;
    source ? end("Paused.") : start();
  });
  // Nobody reads a hidden page.
  document.addEventListener("visibilitychange", () => {
    if (document.hidden && source) end("Paused while the page was hidden.");
    else if (!document.hidden && wanted && !source) start();
  });
  addEventListener("pagehide", () => source?.close());
})();

// What the console does beside HTML: keep a page fresh, open dialogs over it, copy, and write times of here.
// Every page works without it.
"use strict";
(() => {
  const EVERY = 5000;
  const live = document.getElementById("live");
  const away = document.getElementById("away");
  const polled = live?.hasAttribute("hx-get");
  let paused = false, waiting = false, failed = 0;

  // --- Fresh: one request at a time, none from a hidden tab, behind a dialog or under somebody's hands.
  const asked = () => live.dispatchEvent(new CustomEvent("live"));
  const busy = () =>
    waiting || paused || document.hidden || document.querySelector("dialog[open]") ||
    (live.contains(document.activeElement) && document.activeElement.matches("input, textarea, select")) ||
    getSelection()?.type === "Range";
  if (polled) {
    setInterval(() => busy() || asked(), EVERY);
    document.addEventListener("visibilitychange", () => busy() || asked());
  }
  document.addEventListener("htmx:before:request", (event) => {
    if (event.target === live) waiting = true;
  });
  document.addEventListener("htmx:after:request", (event) => {
    if (event.target !== live) return;
    const status = event.detail.ctx.response.status;
    heard(status < 400 ? 0 : status);
  });
  document.addEventListener("htmx:error", (event) => {
    if (event.target === live) heard(-1);
  });
  document.addEventListener("htmx:finally:request", (event) => {
    if (event.target === live) waiting = false;
  });
  function heard(problem) {
    failed = problem ? failed || Date.now() : 0;
    document.body.classList.toggle("stale", Boolean(problem));
    away.hidden = !problem;
    if (!problem) return;
    const why = problem < 0 ? "does not answer" : `answers ${problem}`;
    away.textContent = `The control plane ${why} since ${new Date(failed).toLocaleTimeString()}. What you see is old; the page asks again every ${EVERY / 1000} s.`;
  }

  // --- Times: how old the page is, and each time as it is here.
  let loaded = Date.now(), shown = 0;
  function age() {
    const line = document.querySelector(".asof");
    if (!line) return;
    if (line.dataset.at !== shown) [shown, loaded] = [line.dataset.at, Date.now()];
    const seconds = Math.round((Date.now() - loaded) / 1000);
    line.querySelector(".age").textContent = seconds < 2 ? "" : `(${seconds < 120 ? `${seconds} s` : `${Math.round(seconds / 60)} min`} old)`;
    const button = line.querySelector(".pause");
    if (button) {
      button.hidden = false;
      button.textContent = paused ? "Resume" : "Pause";
      button.setAttribute("aria-pressed", String(paused));
    }
  }
  setInterval(age, 1000);
  document.addEventListener("mouseover", (event) => {
    const time = event.target.closest?.("time[datetime]");
    if (!time || time.dataset.local) return;
    time.dataset.local = "1";
    time.title += ` · here ${new Date(time.dateTime).toLocaleString()}`;
  });

  // --- Dialogs: the URL opens them, and a script shows them over the page.
  const place = document.getElementById("dialog");
  let opener = null;
  function show() {
    const dialog = place?.querySelector("dialog");
    if (!dialog) return;
    if (dialog.open) dialog.removeAttribute("open");
    dialog.showModal();
    const first = dialog.querySelector("[autofocus], input:not([type=hidden]):not([readonly]), select, textarea, button");
    first?.focus();
  }
  async function open(link) {
    opener = link;
    try {
      const answer = await fetch(link.href, { headers: { "HX-Request": "true" } });
      const page = new DOMParser().parseFromString(await answer.text(), "text/html");
      const found = page.querySelector("#dialog dialog");
      if (!found) throw new Error("no dialog");
      place.replaceChildren(document.adoptNode(found));
    } catch {
      location.href = link.href;
      return;
    }
    // The URL is the page's state: it can be copied, and Back closes.
    history.pushState({ dialog: true }, "", link.href);
    dress(place);
    show();
  }
  function close() {
    const dialog = place.querySelector("dialog");
    const back = dialog?.querySelector("a.close")?.href;
    dialog?.close();
    place.replaceChildren();
    if (back) history.replaceState(null, "", back);
    opener?.isConnected ? opener.focus() : document.getElementById("main").focus();
    opener = null;
  }
  addEventListener("popstate", () => location.reload());
  place?.addEventListener("cancel", (event) => { event.preventDefault(); close(); }, true);
  document.addEventListener("click", (event) => {
    if (event.defaultPrevented || event.button || event.ctrlKey || event.metaKey || event.shiftKey) return;
    const link = event.target.closest("a");
    if (link?.matches("a[data-dialog]")) { event.preventDefault(); open(link); }
    else if (link?.closest("dialog") && link.matches(".close, [data-close]")) { event.preventDefault(); close(); }
  });

  // --- Buttons
  document.addEventListener("click", async (event) => {
    const button = event.target.closest("button");
    if (button?.matches(".pause")) { paused = !paused; age(); if (!paused) asked(); }
    if (!button?.dataset.copy) return;
    const text = document.getElementById(button.dataset.copy).textContent;
    try {
      await navigator.clipboard.writeText(text);
      say("Copied.");
    } catch {
      getSelection().selectAllChildren(document.getElementById(button.dataset.copy));
      say("Selected: copy it with Ctrl-C.");
    }
  });
  // A form is sent once.
  document.addEventListener("submit", (event) => {
    if (event.target.method !== "post" || event.defaultPrevented) return;
    setTimeout(() => event.target.querySelectorAll("button").forEach((one) => { one.disabled = true; }));
  });
  addEventListener("pageshow", (event) => {
    if (event.persisted) location.reload();
  });
  function say(text) {
    const toast = document.getElementById("said");
    toast.textContent = text;
    toast.hidden = false;
    setTimeout(() => { toast.hidden = true; }, 3000);
  }

  // --- At the start
  function dress(root) {
    root.querySelectorAll("[data-copy]").forEach((one) => { one.hidden = false; });
    // A filter that is chosen is applied.
    root.querySelectorAll("form.filters select").forEach((one) => {
      one.addEventListener("change", () => one.form.requestSubmit());
    });
  }
  dress(document);
  show();
  age();
  const url = new URL(location.href);
  if (url.searchParams.has("done")) {
    url.searchParams.delete("done");
    history.replaceState(null, "", url);
  }
  window.consoleSay = say;
})();

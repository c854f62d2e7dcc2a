// The rating sheet: one photo at a time. Ratings are stored in this browser until they are saved as
// a file. A digit rates the focused caption, or else the first caption without a rating.
"use strict";
{
  const main = document.querySelector("main"), items = [...document.querySelectorAll(".item")];
  const rater = document.getElementById("rater"), status = document.getElementById("status");
  const store = `review-${main.dataset.sheet}`;
  let shown = 0;

  const ratings = () =>
    Object.fromEntries(
      [...main.querySelectorAll("input:checked")].map((input) => [input.name, Number(input.value)]),
    );

  const open = (item) =>
    [...item.querySelectorAll("fieldset")].find((field) => !field.querySelector(":checked"));

  const tell = () => {
    const done = items.filter((item) => !open(item)).length;
    const all = done === items.length ? " All are rated: save the ratings." : "";
    status.textContent = `Photo ${shown + 1} of ${items.length}; ${done} rated.${all}`;
  };

  // A private window may forbid storage; ratings are then lost when it is closed.
  const keep = () => {
    try {
      localStorage.setItem(store, JSON.stringify({ rater: rater.value, ratings: ratings() }));
    } catch {}
  };

  const restore = () => {
    try {
      const stored = JSON.parse(localStorage.getItem(store));
      rater.value = stored.rater;
      for (const [name, value] of Object.entries(stored.ratings))
        main.querySelector(`input[name="${name}"][value="${value}"]`).checked = true;
    } catch {}
  };

  const show = (number) => {
    shown = Math.min(items.length - 1, Math.max(0, number));
    items.forEach((item, index) => (item.hidden = index !== shown));
    document.getElementById("back").disabled = shown === 0;
    document.getElementById("next").disabled = shown === items.length - 1;
    tell();
  };

  const turn = (by) => {
    show(shown + by);
    items[shown].querySelector("input").focus();
    scrollTo(0, items[shown].offsetTop);
  };

  document.getElementById("back").addEventListener("click", () => turn(-1));
  document.getElementById("next").addEventListener("click", () => turn(1));
  rater.addEventListener("input", keep);
  main.addEventListener("change", () => {
    keep();
    tell();
  });

  document.addEventListener("keydown", (event) => {
    if (event.target === rater || event.ctrlKey || event.metaKey || event.altKey) return;
    if (!/^[1-5]$/.test(event.key)) return;
    const field = event.target.closest("fieldset") ?? open(items[shown]);
    const input = field?.querySelector(`input[value="${event.key}"]`);
    if (!input) return;
    input.checked = true;
    input.dispatchEvent(new Event("change", { bubbles: true }));
    (open(items[shown])?.querySelector("input") ?? document.getElementById("next")).focus();
  });

  document.getElementById("save").addEventListener("click", () => {
    if (!rater.value.trim()) {
      status.textContent = "Write your name or initials first.";
      rater.focus();
      return;
    }
    const content = { sheet: main.dataset.sheet, rater: rater.value.trim(), ratings: ratings() };
    const link = document.createElement("a");
    link.href = URL.createObjectURL(
      new Blob([JSON.stringify(content, null, 1)], { type: "application/json" }),
    );
    const name = content.rater.replace(/[^\p{L}\p{N}]+/gu, "-");
    link.download = `ratings-${name}-${main.dataset.sheet.slice(0, 6)}.json`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
    const rated = Object.keys(content.ratings).length;
    const all = main.querySelectorAll("fieldset").length;
    status.textContent = `Saved ${rated} of ${all} ratings as ${link.download}.`;
  });

  restore();
  show(Math.max(0, items.findIndex(open)));
}

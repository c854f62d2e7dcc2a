// Words of a caption that name something are buttons. While one is hovered, focused or pressed, its
// map is drawn over the photo of its card. A map is side x side bytes, row by row (handler/web/word_maps.py).
"use strict";
{
  const FINE = 8; // each cell is interpolated to FINE x FINE pixels
  // Viridis, as in handler/attention_maps.py.
  const STOPS = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];

  const colour = (weight) => {
    const position = weight * (STOPS.length - 1);
    const low = Math.min(Math.floor(position), STOPS.length - 2);
    return STOPS[low].map((value, i) => value + (STOPS[low + 1][i] - value) * (position - low));
  };

  const drawn = (bytes) => {
    const side = Math.round(Math.sqrt(bytes.length));
    const canvas = document.createElement("canvas");
    canvas.width = canvas.height = side * FINE;
    const context = canvas.getContext("2d");
    const picture = context.createImageData(canvas.width, canvas.height);
    const cell = (x, y) =>
      bytes[Math.min(side - 1, Math.max(0, y)) * side + Math.min(side - 1, Math.max(0, x))];
    for (let row = 0; row < canvas.height; row++) {
      const y = (row + 0.5) / FINE - 0.5, y0 = Math.floor(y), down = y - y0;
      for (let column = 0; column < canvas.width; column++) {
        const x = (column + 0.5) / FINE - 0.5, x0 = Math.floor(x), across = x - x0;
        const upper = cell(x0, y0) * (1 - across) + cell(x0 + 1, y0) * across;
        const lower = cell(x0, y0 + 1) * (1 - across) + cell(x0 + 1, y0 + 1) * across;
        const [red, green, blue] = colour((upper * (1 - down) + lower * down) / 255);
        picture.data.set([red, green, blue, 255], (row * canvas.width + column) * 4);
      }
    }
    context.putImageData(picture, 0, 0);
    return canvas;
  };

  // A box "x0 y0 x1 y1" of fractions, as CSS properties in percent.
  const sides = (shares) => {
    const [x0, y0, x1, y1] = shares.split(" ").map((share) => 100 * share);
    return { left: x0, top: y0, width: x1 - x0, height: y1 - y0 };
  };

  const setPosition = (element, sides) => {
    for (const [name, value] of Object.entries(sides)) element.style[name] = value + "%";
  };

  const clear = (card) => {
    card.querySelectorAll(".map").forEach((map) => map.remove());
    card.querySelector(".photo img").classList.remove("under");
  };

  const show = (word) => {
    const card = word.closest(".card"), image = card.querySelector(".photo img");
    clear(card);
    const map = document.createElement("div");
    map.className = "map";
    setPosition(map, sides(word.parentElement.dataset.seen)); // the region that the model saw
    map.append(drawn(Uint8Array.from(atob(word.dataset.map), (c) => c.charCodeAt(0))));
    if (word.dataset.box) {
      const [x, y] = word.dataset.centre.split(" ").map((share) => 100 * share);
      const box = document.createElement("div"), centre = document.createElement("div");
      [box.className, centre.className] = ["box", "centre"];
      setPosition(box, sides(word.dataset.box));
      setPosition(centre, { left: x, top: y });
      map.append(box, centre);
    }
    image.classList.add("under");
    image.parentElement.append(map);
  };

  // What is shown when the pointer leaves a word: the map of the pressed word, or none.
  const showPressed = (card) => {
    const pressed = card.querySelector(".word[aria-pressed=true]");
    if (pressed) show(pressed);
    else clear(card);
  };

  const onWord = (act) => (event) => {
    const word = event.target.closest("button.word");
    if (word) act(word, event);
  };

  document.addEventListener("pointerover", onWord((word, event) => {
    if (event.pointerType === "mouse") show(word);
  }));
  document.addEventListener("pointerout", onWord((word) => showPressed(word.closest(".card"))));
  document.addEventListener("focusin", onWord(show));
  document.addEventListener("focusout", onWord((word) => showPressed(word.closest(".card"))));
  document.addEventListener("click", onWord((word) => {
    const card = word.closest(".card"), pressed = word.getAttribute("aria-pressed") === "true";
    for (const other of card.querySelectorAll(".word[aria-pressed=true]"))
      other.setAttribute("aria-pressed", "false");
    word.setAttribute("aria-pressed", String(!pressed));
    showPressed(card);
  }));
}

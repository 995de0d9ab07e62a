"use strict";
// Flips the large images and sorts the cards. Everything is readable without it.

const gallery = document.querySelector(".gallery");
const tools = document.querySelector(".tools");

function show(card) {
  const input = card.querySelector(".cell input:checked");
  const image = input.parentElement.querySelector("img");
  const stage = card.querySelector(".stage img");
  stage.src = image.src;
  stage.alt = image.alt;
  card.querySelector(".stage figcaption").textContent = input.dataset.caption;
  for (const dot of card.querySelectorAll(".dot")) {
    dot.classList.toggle("now", dot.dataset.view === input.value);
  }
}

// view: "original", "chosen" or a number of tokens
function flip(card, view) {
  const input = card.querySelector(view === "chosen" ? ".chosen input" : `input[value="${view}"]`);
  if (input) {
    input.checked = true;
    show(card);
  }
}

if (gallery && tools) {
  const cards = [...gallery.querySelectorAll(".card")];
  for (const card of cards) {
    card.addEventListener("change", () => show(card));
    card.querySelector(".stage img").addEventListener("click", () => {
      flip(card, card.querySelector(".chosen input").checked ? "original" : "chosen");
    });
    show(card);
  }
  tools.querySelector("#view").addEventListener("change", (event) => {
    for (const card of cards) flip(card, event.target.value);
  });
  tools.querySelector("#sort").addEventListener("change", (event) => {
    const rank = (card) => Number(card.dataset[event.target.value]);
    gallery.append(...[...cards].sort((a, b) => rank(a) - rank(b)));
  });
  tools.hidden = false;
  document.documentElement.classList.add("live");
}

"use strict";
// One example user at a time. Without this script all of them stand one under the other.
(() => {
  const cards = [...document.querySelectorAll("#cards > .user")];
  if (!cards.length) return;
  const at = (id) => document.getElementById(id);
  const [group, user, place] = [at("group"), at("user"), at("place")];
  let shown = cards;
  const show = (number) => {
    const index = (number + shown.length) % shown.length;
    cards.forEach((card) => { card.hidden = card !== shown[index]; });
    user.value = shown[index].dataset.number;
    place.textContent = `${index + 1} of ${shown.length}`;
  };
  const filter = () => {
    shown = cards.filter((card) => !group.value || card.dataset.group === group.value);
    user.replaceChildren(...shown.map((card) => new Option(card.dataset.name, card.dataset.number)));
    show(0);
  };
  const index = () => shown.findIndex((card) => !card.hidden);
  group.addEventListener("change", filter);
  user.addEventListener("change", () => show(shown.findIndex((card) => card.dataset.number === user.value)));
  at("previous").addEventListener("click", () => show(index() - 1));
  at("next").addEventListener("click", () => show(index() + 1));
  at("controls").hidden = false;
  filter();
})();

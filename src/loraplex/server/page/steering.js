// Attention steering: parts of a question are marked, each with a strength, and asked beside what was.

import { button, el, tell } from "./dom.js";

const LARGEST = 10; // of the slider; more by typing
const FIRST = 4;

export class SteeringEditor {
  #marks = []; // {text, strength}
  #list = el("ul", { className: "marked" });
  #which = el("select");
  #problem = el("p", { className: "problem small", hidden: true, role: "alert" });
  #area;
  #ask;

  constructor(turn) {
    this.turn = turn;
    this.#area = el("textarea", { value: turn.user, readOnly: true, rows: 2 });
    this.#area.setAttribute("aria-label", "Question, to mark a part of it");
    this.#which.setAttribute("aria-label", "Answer to steer");
    this.#ask = button("Answer beside it, steered", () => this.#send(), { className: "primary" });
    const hint = "Select a part of the question, mark it, and set how much attention it gets: 1 changes nothing, 0 hides it.";
    this.element = el("div", { className: "steering" },
      el("p", { className: "muted small", textContent: hint }),
      this.#area,
      el("div", { className: "row" }, button("Mark the selection", () => this.#mark())),
      this.#list, this.#problem,
      el("div", { className: "row" }, this.#which, this.#ask),
    );
    this.#offer();
    this.#render();
  }

  focus() {
    this.#area.focus();
  }

  #offer() {
    const plain = this.turn.answers.filter(({ asked }) => !asked.steer.length);
    this.#which.replaceChildren(...plain.map((answer) =>
      el("option", { value: String(this.turn.answers.indexOf(answer)), textContent: answer.asked.model })));
    this.#which.hidden = plain.length < 2;
  }

  #mark() {
    const { selectionStart: start, selectionEnd: stop, value } = this.#area;
    const text = value.slice(start, stop).trim();
    this.#tell(text ? "" : "Select a part of the question first: with the mouse, or with Shift and the arrow keys.");
    if (!text || this.#marks.some((mark) => mark.text === text)) return;
    this.#marks.push({ text, strength: FIRST });
    this.#render();
    this.#list.lastElementChild.querySelector("input").focus();
  }

  #render() {
    this.#list.replaceChildren(...this.#marks.map((mark) => this.#row(mark)));
    this.#ask.disabled = !this.#marks.length;
  }

  #row(mark) {
    const slider = el("input", { type: "range", min: 0, max: LARGEST, step: 0.1, value: mark.strength });
    const field = el("input", { type: "number", min: 0, step: 0.1, value: mark.strength });
    slider.setAttribute("aria-label", `Strength of ${mark.text}`);
    field.setAttribute("aria-label", `Strength of ${mark.text}, as a number`);
    const take = (from, to) => from.addEventListener("input", () => {
      to.value = from.value;
      mark.strength = Number(from.value);
    });
    take(slider, field);
    take(field, slider);
    const remove = button("×", () => {
      this.#marks = this.#marks.filter((other) => other !== mark);
      this.#render();
    }, { className: "icon", label: `Remove the mark of ${mark.text}` });
    return el("li", {}, el("span", { className: "mark-text", textContent: mark.text }), slider, field, remove);
  }

  #send() {
    const wrong = this.#marks.find(({ strength }) => !Number.isFinite(strength) || strength < 0);
    const answer = this.turn.answers[Number(this.#which.value || 0)] ?? this.turn.answers[0];
    this.#tell(wrong ? `The strength of “${wrong.text}” must be 0 or more.` : "");
    if (wrong || !answer) return;
    tell(this.element, "steer", { turn: this.turn, answer, steer: this.#marks.map((mark) => ({ ...mark })) });
  }

  #tell(text) {
    this.#problem.textContent = text;
    this.#problem.hidden = !text;
  }
}

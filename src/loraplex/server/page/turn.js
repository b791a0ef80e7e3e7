// A question and the answers to it, beside each other.

import { Answer } from "./answer.js";
import { button, el, tell } from "./dom.js";
import { differences } from "./differences.js";
import { SteeringEditor } from "./steering.js";

export const CONTEXTS = {
  fresh: "",
  own: "each column goes on from its own answers",
  shared: "all columns go on from the first column's answers",
};

export class Turn {
  answers = [];
  isStale = false; // a question before it was changed afterwards
  #grid = el("div", { className: "answers" });
  #question = el("div", { className: "question" });
  #context = el("p", { className: "context small", hidden: true });
  #steering = null;

  /** `context`: a name of CONTEXTS; `numBefore`: how many turns it goes on from. */
  constructor(user, context, numBefore) {
    Object.assign(this, { user, context, numBefore });
    this.element = el("section", { className: "turn" });
    this.element.append(this.#question, this.#context, this.#grid);
    this.#showQuestion();
    this.showContext();
  }

  static from(record) {
    const turn = new Turn(record.user, record.context, record.numBefore);
    turn.isStale = record.isStale;
    turn.showContext();
    for (const one of record.answers) turn.place(Answer.from(one));
    return turn;
  }

  record() {
    const { user, context, numBefore, isStale } = this;
    return { user, context, numBefore, isStale, answers: this.answers.map((answer) => answer.record()) };
  }

  /** Put an answer in the place of another, behind another, or at the end. */
  place(answer, { instead = null, behind = null } = {}) {
    if (instead) {
      this.answers[this.answers.indexOf(instead)] = answer;
      instead.element.replaceWith(answer.element);
    } else if (behind) {
      this.answers.splice(this.answers.indexOf(behind) + 1, 0, answer);
      behind.element.after(answer.element);
    } else {
      this.answers.push(answer);
      this.#grid.append(answer.element);
    }
    this.#arrange();
  }

  remove(answer) {
    this.answers = this.answers.filter((other) => other !== answer);
    answer.element.remove();
    this.#arrange();
    this.compare();
  }

  /** Mark what differs, of answers that are finished. */
  compare() {
    const done = (answer) => answer && answer.ended !== null && answer.ended !== "error";
    for (const answer of this.answers) {
      const reference = this.#referenceOf(answer);
      const isAlone = reference === answer || !done(answer) || !done(reference);
      answer.mark(isAlone ? null : differences(reference.text, answer.text), nameOf(reference, this.answers));
    }
  }

  /** A steered answer differs from the same without, any other from the first. */
  #referenceOf({ asked }) {
    const plain = this.answers.filter((other) => !other.asked.steer.length);
    return (asked.steer.length && plain.find((other) => other.asked.column === asked.column)) || this.answers[0];
  }

  showContext() {
    const parts = [];
    if (this.numBefore) parts.push(`After ${this.numBefore} ${this.numBefore === 1 ? "turn" : "turns"}: ${CONTEXTS[this.context]}`);
    if (this.isStale) parts.push("asked before the question above was changed");
    this.#context.textContent = parts.join("; ");
    this.#context.hidden = !parts.length;
  }

  #arrange() {
    this.#grid.classList.toggle("several", this.answers.length > 1);
    this.#grid.style.setProperty("--columns", this.answers.length);
  }

  #showQuestion() {
    const text = el("p", { className: "user", textContent: this.user });
    const tools = el("div", { className: "tools" },
      button("Edit", () => this.#edit(), { className: "quiet", label: "Edit the question" }),
      button("Ask again", () => tell(this.element, "reask", { turn: this, user: this.user }), {
        className: "quiet", label: "Ask again, with the choices and settings of now",
      }),
      button("Steer", () => this.#steer(), { className: "quiet", label: "Steer the attention to parts of the question" }),
    );
    this.#question.replaceChildren(text, tools);
  }

  #edit() {
    const area = el("textarea", { value: this.user, rows: 3 });
    area.setAttribute("aria-label", "Question");
    const send = () => {
      const user = area.value.trim();
      if (user) tell(this.element, "reask", { turn: this, user });
    };
    const cancel = () => this.#showQuestion();
    area.addEventListener("keydown", (event) => {
      if (event.key === "Escape") { event.stopPropagation(); cancel(); }
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      send();
    });
    const row = el("div", { className: "row" }, button("Ask", send, { className: "primary" }), button("Cancel", cancel));
    this.#question.replaceChildren(area, row);
    area.focus();
  }

  /** Show another question in the place of this one's. */
  rewrite(user) {
    this.user = user;
    for (const answer of this.answers) answer.element.remove();
    this.answers = [];
    this.#steering?.element.remove();
    this.#steering = null;
    this.#showQuestion();
  }

  #steer() {
    if (this.#steering) {
      this.#steering.element.remove();
      this.#steering = null;
      return;
    }
    this.#steering = new SteeringEditor(this);
    this.#context.after(this.#steering.element);
    this.#steering.focus();
  }
}

function nameOf(answer, all) {
  const isOnly = all.filter(({ asked }) => asked.model === answer.asked.model).length === 1;
  return isOnly ? answer.asked.model : `answer ${all.indexOf(answer) + 1}`;
}

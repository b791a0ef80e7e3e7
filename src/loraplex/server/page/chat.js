// The conversation: turns, what is asked for them, and what is running.

import { apiKey, streamChat } from "./api.js";
import { Answer } from "./answer.js";
import { announce, button, byId } from "./dom.js";
import { pageBody } from "./request.js";
import { Turn } from "./turn.js";

export class Chat {
  turns = [];
  #running = new Map(); // Answer -> AbortController
  #root = byId("turns");
  #welcome = byId("welcome");
  #format = "markdown";
  onUnauthorized = () => {};
  onBusy = () => {};
  onReplaced = () => {};
  onRefused = () => {}; // as written: its prompt is the user's again
  onDrawn = () => {}; // the elements of tokens are others

  constructor() {
    this.#root.addEventListener("again", ({ detail }) => this.again(detail.answer, detail.changes));
    this.#root.addEventListener("remove", ({ detail }) => this.#remove(detail.answer));
    this.#root.addEventListener("steer", ({ detail }) => this.steer(detail.answer, detail.steer));
  }

  get busy() {
    return this.#running.size > 0;
  }

  get format() {
    return this.#format;
  }

  set format(format) {
    this.#format = format;
    for (const { answers } of this.turns) for (const answer of answers) answer.show(format);
    this.onDrawn();
  }

  /** Ask all columns; `asked` has for each what its request needs. Resolves when all have ended. */
  send(user, context, asked) {
    this.#welcome.remove();
    const numBefore = context === "fresh" ? 0 : this.turns.length;
    const turn = new Turn(user, context, numBefore);
    this.turns.push(turn);
    this.#root.append(turn.element);
    return this.#ask(turn, asked);
  }

  /** Ask another question, or the same with other choices, in the place of a turn's. */
  rewrite(turn, user, asked) {
    this.#stop(turn.answers);
    if (user !== turn.user) {
      for (const later of this.turns.slice(this.turns.indexOf(turn) + 1)) {
        if (later.context === "fresh") continue;
        later.isStale = true;
        later.showContext();
      }
    }
    turn.rewrite(user);
    return this.#ask(turn, asked);
  }

  /** Ask once more in place of `old`: with its seed, it gives the same tokens. */
  again(old, changes) {
    const turn = this.turnOf(old);
    if (!turn || this.#running.has(old)) return Promise.resolve();
    const answer = new Answer({ ...old.asked, ...changes });
    turn.place(answer, { instead: old });
    this.onReplaced(old, answer);
    return this.#run(turn, answer);
  }

  /** Ask beside `old`, with attention to parts of the question. */
  steer(old, steer) {
    const turn = this.turnOf(old);
    const answer = new Answer({ ...old.asked, steer });
    turn.place(answer, { behind: old });
    const ended = this.#run(turn, answer);
    answer.element.scrollIntoView({ block: "nearest", inline: "end" });
    return ended;
  }

  turnOf(answer) {
    return this.turns.find(({ answers }) => answers.includes(answer));
  }

  stop() {
    this.#stop([...this.#running.keys()]);
  }

  clear() {
    this.stop();
    this.turns = [];
    this.#root.replaceChildren(this.#welcome);
    this.#root.scrollTop = 0;
  }

  record() {
    return this.turns.map((turn) => turn.record());
  }

  restore(records) {
    this.clear();
    this.turns = records.map((record) => Turn.from(record));
    this.#root.replaceChildren(...this.turns.map(({ element }) => element));
    for (const turn of this.turns) turn.compare();
    this.format = this.#format;
  }

  #stop(answers) {
    for (const answer of answers) this.#running.get(answer)?.abort();
  }

  #ask(turn, asked) {
    const made = asked.map((one) => {
      const messages = this.#messages(turn, one);
      const answer = new Answer({ steer: [], ...one, messages });
      turn.place(answer);
      return answer;
    });
    turn.element.scrollIntoView({ block: made.length > 1 ? "start" : "end" });
    return Promise.all(made.map((answer) => this.#run(turn, answer)));
  }

  async #run(turn, answer) {
    const controller = new AbortController();
    answer.format = this.#format;
    this.#running.set(answer, controller);
    this.onBusy();
    try {
      for await (const chunk of streamChat(pageBody(answer.asked), controller.signal)) {
        const follows = this.#isAtEnd();
        if (chunk.choices[0]) answer.add(chunk.choices[0]);
        if (follows) this.#root.scrollTop = this.#root.scrollHeight;
      }
      announce(`${answer.asked.model} answered: ${answer.text}`);
    } catch (error) {
      if (error.name === "AbortError") answer.end("stopped");
      else this.#refuse(turn, answer, error);
    } finally {
      this.#running.delete(answer);
      turn.compare();
      this.onBusy();
    }
  }

  #refuse(turn, answer, error) {
    const actions = [];
    const { capture } = answer.asked;
    if (capture && !capture.reduce && error.code === "too_large") {
      const change = { capture: { ...capture, reduce: "mean" } };
      actions.push(button("With the mean of the heads", () => this.again(answer, change)));
    }
    answer.refuse(error, ...actions);
    if (error.status === 401) this.onUnauthorized(apiKey.get() ? error.message : "");
    if (error.status === 400) this.onRefused(turn.user);
    this.#root.scrollTop = this.#root.scrollHeight;
  }

  #remove(answer) {
    const turn = this.turnOf(answer);
    turn.remove(answer);
    if (!turn.answers.length) {
      this.turns = this.turns.filter((other) => other !== turn);
      turn.element.remove();
      if (!this.turns.length) this.#root.replaceChildren(this.#welcome);
    }
    this.onBusy();
  }

  /** What a column's request begins with: nothing, or the turns before with its own answers or the first column's. */
  #messages(turn, { column, system }) {
    const messages = system ? [{ role: "system", content: system }] : [];
    const before = turn.context === "fresh" ? [] : this.turns.slice(0, this.turns.indexOf(turn));
    for (const { user, answers } of before) {
      const own = answers.find(({ asked }) => asked.column === column && !asked.steer.length);
      const answer = (turn.context === "own" && own) || answers[0];
      const content = answer?.text;
      if (content) messages.push({ role: "user", content: user }, { role: "assistant", content });
    }
    return [...messages, { role: "user", content: turn.user }];
  }

  #isAtEnd() {
    return this.#root.scrollHeight - this.#root.scrollTop - this.#root.clientHeight < 60;
  }
}

// The conversation: turns with one answer, or two beside each other.

import { apiKey, streamChat } from "./api.js";
import { Answer } from "./answer.js";
import { announce, byId, el } from "./dom.js";

export class Chat {
  #turns = []; // {user, answers: [Answer or null for each side]}
  #running = new Map(); // Answer -> AbortController
  #root = byId("turns");
  #welcome = byId("welcome");
  onUnauthorized = () => {};
  onBusy = () => {};
  onReplaced = () => {};
  onRefused = () => {}; // as written: its prompt is the user's again

  get busy() {
    return this.#running.size > 0;
  }

  /** Ask all sides; `asked` has for each side what its request needs. */
  send(user, asked) {
    this.#welcome.remove();
    for (const prompt of this.#root.querySelectorAll("details[open]")) prompt.open = false; // of earlier turns
    const turn = { user, answers: [] };
    const answers = el("div", { className: asked.length > 1 ? "answers two" : "answers" });
    turn.element = el("section", { className: "turn" }, el("p", { className: "user", textContent: user }), answers);
    this.#turns.push(turn);
    this.#root.append(turn.element);
    asked.forEach((one, side) => {
      turn.answers[side] = new Answer(one);
      answers.append(turn.answers[side].element);
      this.#run(turn, side);
    });
    turn.element.scrollIntoView({ block: "end" });
  }

  /** Ask once more in place of `old`: with its seed, it gives the same tokens. */
  again(old, changes) {
    const turn = this.#turns.find(({ answers }) => answers.includes(old));
    if (!turn || this.#running.has(old)) return;
    const side = turn.answers.indexOf(old);
    const answer = (turn.answers[side] = new Answer({ ...old.asked, ...changes }));
    old.element.replaceWith(answer.element);
    this.onReplaced(old, answer);
    this.#run(turn, side);
  }

  stop() {
    for (const controller of this.#running.values()) controller.abort();
  }

  clear() {
    this.stop();
    this.#turns = [];
    this.#root.replaceChildren(this.#welcome);
    this.#root.scrollTop = 0;
  }

  async #run(turn, side) {
    const answer = turn.answers[side];
    const controller = new AbortController();
    this.#running.set(answer, controller);
    this.onBusy();
    try {
      for await (const chunk of streamChat(this.#body(turn, side), controller.signal)) {
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
      this.onBusy();
    }
  }

  #refuse(turn, answer, error) {
    const mayPass = [0, 401, 408, 429].includes(error.status) || error.status >= 500;
    const retry = el("button", { type: "button", textContent: "Try again" });
    retry.addEventListener("click", () => this.again(answer, {}));
    answer.refuse(error, mayPass ? retry : null);
    if (error.status === 401) this.onUnauthorized(apiKey.get() ? error.message : "");
    if (!mayPass) this.onRefused(turn.user);
    this.#root.scrollTop = this.#root.scrollHeight;
  }

  #body(turn, side) {
    const { asked } = turn.answers[side];
    const body = {
      model: asked.model,
      messages: this.#messages(turn, side, asked.system),
      temperature: asked.temperature,
      max_completion_tokens: asked.maxTokens,
      seed: asked.seed,
      logprobs: true, // whose entries are the tokens
    };
    if (asked.mixtures.length) body.return_scalings = true;
    if (asked.capture) body.capture_attention = asked.capture;
    return body;
  }

  /** What came before on this side; where it had no answer, the first side's. */
  #messages(turn, side, system) {
    const messages = system ? [{ role: "system", content: system }] : [];
    for (const { user, answers } of this.#turns.slice(0, this.#turns.indexOf(turn))) {
      const content = (answers[side] ?? answers[0]).text;
      if (content) messages.push({ role: "user", content: user }, { role: "assistant", content });
    }
    return [...messages, { role: "user", content: turn.user }];
  }

  #isAtEnd() {
    return this.#root.scrollHeight - this.#root.scrollTop - this.#root.clientHeight < 60;
  }
}

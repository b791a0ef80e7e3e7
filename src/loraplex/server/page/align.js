// Which part of an answer's text belongs to which token.
//
// A token's own text is not always a piece of the answer's: a character may be spread over several tokens, some
// tokenizers drop the space before a token that stands alone, and an end token has no text in the answer.

const UNKNOWN = "\ufffd";
const LONGEST_GAP = 8; // characters between two tokens' texts

export class Aligner {
  #text = "";
  #place = 0; // everything before it has its token
  #tokens = [];
  #next = 0; // the first token without a place

  /** Take what came; returns [token index, text] for every token whose text is known now. */
  add(text, tokens) {
    this.#text += text;
    this.#tokens.push(...tokens);
    const found = [];
    let look = this.#next;
    while (look < this.#tokens.length) {
      const own = this.#tokens[look];
      const at = own && !own.includes(UNKNOWN) ? this.#text.indexOf(own, this.#place) : -1;
      const most = LONGEST_GAP * (look - this.#next) + 1;
      if (at >= 0 && at - this.#place <= most) {
        this.#give(look, at, at + own.length, found);
        look = this.#next;
      } else look += 1;
    }
    return found;
  }

  /** The end: what has no token yet goes to the first that waits. */
  finish() {
    const found = [];
    if (this.#next < this.#tokens.length && this.#place < this.#text.length) {
      found.push([this.#next, this.#text.slice(this.#place)]);
      this.#place = this.#text.length;
    }
    return found;
  }

  // Tokens that waited share the text before this one: the last of them completed it.
  #give(token, start, stop, found) {
    const gap = this.#text.slice(this.#place, start);
    const waited = token > this.#next;
    if (waited && gap) found.push([token - 1, gap]);
    found.push([token, (waited ? "" : gap) + this.#text.slice(start, stop)]);
    this.#place = stop;
    this.#next = token + 1;
  }
}

// Where one text's words differ from another's.

const MAX_CELLS = 4_000_000; // of the table; what is larger counts as different as a whole

/** The words of `text` that are not in `reference`, in its order: {ranges: [[start, stop]], words, first}. */
export function differences(reference, text) {
  const [old, now] = [words(reference), words(text)];
  let head = 0;
  while (head < old.length && head < now.length && old[head].word === now[head].word) head += 1;
  let tail = 0;
  const most = Math.min(old.length, now.length) - head;
  while (tail < most && old[old.length - 1 - tail].word === now[now.length - 1 - tail].word) tail += 1;
  const middle = now.slice(head, now.length - tail);
  const kept = common(old.slice(head, old.length - tail), middle);
  const changed = middle.filter((_, index) => !kept.has(index));
  const isSame = !changed.length && old.length === now.length;
  const first = changed.length ? now.indexOf(changed[0]) : head;
  return { ranges: changed.map(({ start, stop }) => [start, stop]), words: now.length, first, isSame };
}

function words(text) {
  return [...text.matchAll(/\S+/g)].map((match) => ({
    word: match[0], start: match.index, stop: match.index + match[0].length,
  }));
}

/** Indices of `now` in a longest common subsequence with `old`. */
function common(old, now) {
  const kept = new Set();
  if (!old.length || !now.length || old.length * now.length > MAX_CELLS) return kept;
  const width = now.length + 1;
  const lengths = new Uint16Array((old.length + 1) * width);
  for (let i = old.length - 1; i >= 0; i -= 1) {
    for (let j = now.length - 1; j >= 0; j -= 1) {
      const skipped = Math.max(lengths[(i + 1) * width + j], lengths[i * width + j + 1]);
      lengths[i * width + j] = old[i].word === now[j].word ? lengths[(i + 1) * width + j + 1] + 1 : skipped;
    }
  }
  for (let i = 0, j = 0; i < old.length && j < now.length; ) {
    if (old[i].word === now[j].word) { kept.add(j); i += 1; j += 1; }
    else if (lengths[(i + 1) * width + j] >= lengths[i * width + j + 1]) i += 1;
    else j += 1;
  }
  return kept;
}

// What an answer was asked with, as the API's body and as a command.

import { AUTO } from "./models.js";

const NUM_ALTERNATIVES = 5;

/** The body whose answer is the one that is shown. */
export function requestBody(asked) {
  const { model, messages, temperature, topP, maxTokens, seed, stop, schema, steer } = asked;
  const body = { model, messages, temperature, max_completion_tokens: maxTokens, seed };
  if (topP !== null) body.top_p = topP;
  if (stop.length) body.stop = stop;
  if (schema) body.response_format = { type: "json_schema", json_schema: { name: "answer", schema } };
  if (steer.length) body.steer = steer;
  return body;
}

/** The same with what the page shows beside the text. */
export function pageBody(asked) {
  const body = { ...requestBody(asked), logprobs: true, top_logprobs: NUM_ALTERNATIVES }; // whose entries are the tokens
  if (asked.mixtures.length || asked.model === AUTO) body.return_scalings = true;
  if (asked.capture) body.capture_attention = asked.capture;
  return body;
}

/** A command for a shell; the key is a variable, never the key itself. */
export function asCurl(asked, { origin, hasKey }) {
  const body = requestBody(asked);
  if (body.temperature === null) delete body.temperature;
  const lines = [
    `curl ${origin}/v1/chat/completions`,
    "--header 'content-type: application/json'",
    ...(hasKey ? ['--header "authorization: Bearer $LORAPLEX_API_KEY"'] : []),
    `--data ${quoted(JSON.stringify(body, null, 2))}`,
  ];
  return lines.join(" \\\n  ");
}

const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

// Calls of the server's API. The key lives in this tab's session only.

const KEY = "loraplex-key";

export const apiKey = {
  get: () => sessionStorage.getItem(KEY) || "",
  set: (value) => (value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY)),
};

/** What the server refused, in its own words. */
export class ApiError extends Error {
  constructor(body, status, headers) {
    const error = body?.error ?? {};
    super(error.message || `The server answered with status ${status}.`);
    this.status = status;
    this.code = error.code || "";
    this.param = error.param || "";
    this.requestId = headers?.get("x-request-id") || "";
    this.retryAfter = Number(headers?.get("retry-after")) || 0;
  }
}

async function call(path, options = {}) {
  const headers = { ...options.headers };
  if (apiKey.get()) headers.authorization = `Bearer ${apiKey.get()}`;
  if (options.body) headers["content-type"] = "application/json";
  let response;
  try {
    response = await fetch(path, { ...options, headers, credentials: "omit" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError({ error: { message: "The server can't be reached." } }, 0);
  }
  if (!response.ok) throw new ApiError(await response.json().catch(() => null), response.status, response.headers);
  return response;
}

export const getJson = async (path, options) => (await call(path, options)).json();

const adapterPath = (name) => `/v1/adapters/${name.split("/").map(encodeURIComponent).join("/")}`;

export const setPinned = (name, pinned) =>
  getJson(adapterPath(name), { method: "PATCH", body: JSON.stringify({ pinned }) });

export const loadAdapter = (name, path) =>
  getJson("/v1/adapters", { method: "POST", body: JSON.stringify({ name, path }) });

export const unloadAdapter = (name) => getJson(adapterPath(name), { method: "DELETE" });

/** The chunks of a streamed chat completion; an error inside the stream is thrown. */
export async function* streamChat(body, signal) {
  const response = await call("/v1/chat/completions", {
    method: "POST",
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(chunk, response.status, response.headers);
    yield chunk;
  }
  throw new ApiError({ error: { message: "The connection ended before the answer did." } }, 0, response.headers);
}

async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const whole = (buffer + value).split("\n\n");
      buffer = whole.pop();
      for (const event of whole) if (event.startsWith("data: ")) yield event.slice(6);
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

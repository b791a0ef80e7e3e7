// OpenAI's client: a chat, a stream, and runTools, which calls a function and asks again with what it gave.
import assert from "node:assert";
import OpenAI from "openai";

const model = "smollm2-135m";
const client = new OpenAI({ baseURL: process.argv[2], apiKey: "none", timeout: 600_000, maxRetries: 0 });
const messages = [{ role: "user", content: "Say hello." }];
const whole = await client.chat.completions.create({ model, messages, temperature: 0, max_tokens: 8 });
let text = "";
for await (const chunk of await client.chat.completions.create({ model, messages, temperature: 0, max_tokens: 8, stream: true })) {
  text += chunk.choices[0]?.delta?.content ?? "";
}
assert.equal(text, whole.choices[0].message.content);

const called = [];
const tool = {
  type: "function",
  function: {
    name: "get_weather",
    description: "Get the weather.",
    parameters: {
      type: "object",
      properties: { city: { type: "string", enum: ["Paris", "Rome"] } },
      required: ["city"],
    },
    parse: JSON.parse,
    function: ({ city }) => {
      called.push(city);
      return `Sunny in ${city}.`;
    },
  },
};
for (const stream of [false, true]) {
  const runner = client.chat.completions.runTools({
    model,
    messages: [{ role: "user", content: "What is the weather in Paris?" }],
    tools: [tool],
    tool_choice: { type: "function", function: { name: "get_weather" } }, // runTools ends after a call that is named
    temperature: 0,
    max_tokens: 60,
    stream,
  });
  await runner.done();
}
assert.equal(called.length, 2);
assert(called.every((city) => ["Paris", "Rome"].includes(city)));

const response = await client.responses.create({ model, input: "Say hello.", temperature: 0, max_output_tokens: 8 });
assert(response.output_text);

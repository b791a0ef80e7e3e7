// The AI SDK, over /v1/chat/completions and /v1/responses: text, streams, tools that it runs, objects of a schema.
import assert from "node:assert";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, Output, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";

const baseURL = process.argv[2];
const name = "smollm2-135m";
const chat = createOpenAICompatible({ name: "loraplex", baseURL, apiKey: "none", supportsStructuredOutputs: true });
const responses = createOpenAI({ baseURL, apiKey: "none" });
const shape = z.object({ city: z.enum(["Paris", "Rome"]) });

for (const model of [chat(name), responses.responses(name)]) {
  const options = { model, temperature: 0, maxRetries: 0 };
  const whole = await generateText({ ...options, prompt: "Say hello.", maxOutputTokens: 12 });
  let text = "";
  for await (const part of streamText({ ...options, prompt: "Say hello.", maxOutputTokens: 12 }).textStream) text += part;
  assert.equal(text, whole.text);
  const messages = [
    { role: "user", content: "Say hello." },
    ...whole.response.messages, // which /v1/responses gets as a reference
    { role: "user", content: "Say it again." },
  ];
  assert((await generateText({ ...options, messages, maxOutputTokens: 4 })).text);

  const called = [];
  const tools = {
    get_weather: tool({
      description: "Get the weather.",
      inputSchema: shape,
      execute: async ({ city }) => {
        called.push(city);
        return `Sunny in ${city}.`;
      },
    }),
  };
  const prompt = "What is the weather in Paris?";
  const stopWhen = stepCountIs(2); // the second one with what the tool gave
  await generateText({ ...options, prompt, tools, toolChoice: "required", maxOutputTokens: 60, stopWhen });
  const stream = streamText({ ...options, prompt, tools, toolChoice: "required", maxOutputTokens: 60, stopWhen });
  assert.equal((await stream.toolCalls).length > 0, true);
  await stream.text;
  assert(called.length >= 4);

  const { output } = await generateText({ ...options, prompt, output: Output.object({ schema: shape }), maxOutputTokens: 60 });
  assert(["Paris", "Rome"].includes(output.city));
}

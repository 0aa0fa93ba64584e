// The official openai package for Node.js against a server: node openai_node.mjs URL KEY
import assert from "node:assert";
import OpenAI from "openai";

const [url, key] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: key, maxRetries: 0 });
const chat = {
  model: "smollm2", temperature: 0, max_tokens: 12,
  messages: [{ role: "user", content: "Name three primary colours." }],
};

const whole = await client.chat.completions.create({ ...chat, n: 2, logprobs: true, top_logprobs: 3 });
assert.equal(whole.choices.length, 2);
assert.equal(whole.choices[0].message.content, whole.choices[1].message.content);
assert.equal(whole.choices[0].logprobs.content.length, 12);
assert.equal(whole.choices[0].logprobs.content[0].top_logprobs.length, 3);

let streamed = "";
for await (const chunk of await client.chat.completions.create({ ...chat, stream: true })) {
  streamed += chunk.choices[0].delta.content ?? "";
}
assert.equal(streamed, whole.choices[0].message.content);

const several = await client.completions.create({
  model: "smollm2", prompt: ["One, two,", "Red, green,"], max_tokens: 4, temperature: 0,
});
assert.deepEqual(several.choices.map((choice) => choice.index), [0, 1]);

const tools = [{ type: "function", function: { name: "f", parameters: {} } }];
await assert.rejects(client.chat.completions.create({ ...chat, tools }),
  (error) => error.status === 400 && error.param === "tools");

const events = client.chat.completions.stream({ ...chat });
assert.equal(await events.finalContent(), streamed);
console.log(JSON.stringify({ answer: streamed, usage: whole.usage }));

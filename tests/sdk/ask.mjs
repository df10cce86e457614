// Asks a router once or more by an official SDK of Node, and prints what came of the last time, as JSON: see clients.py.
import { createRequire } from "node:module";
import { join } from "node:path";

const { sdks, sdk, url, key, model, retries, times, stream } = JSON.parse(process.argv[2]);
const require = createRequire(join(sdks, "package.json"));
const answers = [];

// As the SDK itself asks, and noted.
async function noting(...request) {
  const answer = await fetch(...request);
  answers.push({ status: answer.status, wait: answer.headers.get("retry-after-ms"), at: performance.now() / 1000 });
  return answer;
}

async function ask() {
  const messages = [{ role: "user", content: "Hello" }];
  const options = { apiKey: key, maxRetries: retries, fetch: noting };
  if (sdk === "openai") {
    const { OpenAI } = require("openai");
    const client = new OpenAI({ baseURL: `${url}/v1`, ...options });
    return client.chat.completions.create({ model, messages, stream, max_tokens: 2 });
  }
  const { Anthropic } = require("@anthropic-ai/sdk");
  const client = new Anthropic({ baseURL: url, ...options });
  return client.messages.create({ model, messages, stream, max_tokens: 2 });
}

let outcome;
for (let n = 0; n < times; n += 1) {
  answers.length = 0;
  try {
    await ask();
    outcome = { error: null, status: 200, message: "", code: null };
  } catch (error) {
    const code = error.error?.error?.code ?? error.code ?? null;
    outcome = { error: error.constructor.name, status: error.status ?? null, message: error.message, code };
  }
}
console.log(JSON.stringify({ ...outcome, answers }));

// Rank by the clients of package.json: standard input has the server's address, a query and documents, standard output
// what each client has found, best first.
import { readFileSync } from "node:fs";
import { CohereRerank } from "@langchain/cohere";
import { CohereClient, CohereClientV2 } from "cohere-ai";

const [environment, query, documents] = JSON.parse(readFileSync(0, "utf8"));
const found = {};
for (const [name, Client] of [["cohere", CohereClient], ["cohere_v2", CohereClientV2]]) {
  const client = new Client({ token: "key", environment });
  const { results } = await client.rerank({ model: "m", query, documents, topN: 2 });
  found[name] = results.map(hit => [documents[hit.index], hit.relevanceScore]);
}
const client = new CohereClient({ token: "key", environment });
const ranker = new CohereRerank({ client, model: "m", topN: 2 });
found.langchain = (await ranker.rerank(documents, query)).map(hit => [documents[hit.index], hit.relevanceScore]);
process.stdout.write(JSON.stringify(found));

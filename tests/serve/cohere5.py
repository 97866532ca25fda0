"""Rank by the clients of cohere5.txt, in whose environment this runs: standard input has the server's address, a query
and documents, standard output what each client has found, best first."""

import json
import sys

import cohere
from langchain_cohere import CohereRerank
from llama_index.core.schema import NodeWithScore, TextNode
from llama_index.postprocessor.cohere_rerank import CohereRerank as Postprocessor

address, query, documents = json.load(sys.stdin)
found = {}
for name, client in (("cohere", cohere.Client), ("cohere_v2", cohere.ClientV2)):
    answer = client("key", base_url=address).rerank(model="m", query=query, documents=documents, top_n=2)
    found[name] = [(documents[result.index], result.relevance_score) for result in answer.results]
results = CohereRerank(model="m", cohere_api_key="key", base_url=address, top_n=2).rerank(documents, query)
found["langchain"] = [(documents[result["index"]], result["relevance_score"]) for result in results]
nodes = [NodeWithScore(node=TextNode(text=text)) for text in documents]
ranked = Postprocessor(api_key="key", base_url=address, top_n=2).postprocess_nodes(nodes, query_str=query)
found["llama_index"] = [(node.node.text, node.score) for node in ranked]
json.dump(found, sys.stdout)

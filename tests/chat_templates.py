"""Chat templates of the kinds that re-rankers bring, and CrossEncoders of sentence-transformers that are saved with
them."""

from sentence_transformers import CrossEncoder
from sentence_transformers.base.modules import Transformer
from sentence_transformers.cross_encoder.modules import LogitScore
from transformers import AutoModelForSequenceClassification

from tests.qwen import write_causal_lm

READ = (
    '{%- set ns = namespace(i=none, q="", d="") -%}'
    "{%- for m in messages -%}"
    '{%- if m.role == "system" -%}{%- set ns.i = m.content -%}'
    '{%- elif m.role == "query" -%}{%- set ns.q = m.content -%}'
    '{%- elif m.role == "document" -%}{%- set ns.d = m.content -%}{%- endif -%}'
    "{%- endfor -%}"
)
JUDGE = (
    READ + "<|im_start|>system\nJudge.<|im_end|>\n<|im_start|>user\n<Instruct>: {{ ns.i or 'Find it' }}\n"
    "<Query>: {{ ns.q }}\n<Document>: {{ ns.d }}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
)
SYSTEM_IS_QUERY = (
    READ + "<|im_start|>system\n"
    "{% if ns.i %}<query>{{ ns.q|trim }}</query>\n<instruction>{{ ns.i }}</instruction>"
    "{% else %}{{ ns.q|trim }}{% endif %}<|im_end|>\n<|im_start|>user\n{{ ns.d|trim }}<|im_end|>\n"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PASSING_ROLES_ON = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
DOCUMENT_FIRST = (
    READ + "Check whether a given document contains information helpful to answer the query.\n"
    "<Document> {{ ns.d }}\n<Query> {{ ns.q }}{% if ns.i %} {{ ns.i }}{% endif %} ??"
)
STRUCTURED = (
    "{% for m in messages %}{% if m.role == 'system' %}[{{ m.content[0].text }}]\n{% endif %}{% endfor %}"
    'query: {{ (messages | selectattr("role", "eq", "query") | first).content[0].text }}\n'
    'passage: {{ (messages | selectattr("role", "eq", "document") | first).content[0].text }}\nrelevant:'
)
KINDS = {
    "judge": JUDGE,
    "system is query": SYSTEM_IS_QUERY,
    "passing roles on": PASSING_ROLES_ON,
    "document first": DOCUMENT_FIRST,
    "structured": STRUCTURED,
    "pairs": None,
}


def write_cross_encoder(
    path, chat_template, false_token=True, prompts=None, default_prompt_name=None, activation_fn=None, classifier=False
):
    """A tiny CrossEncoder of sentence-transformers with this chat template, saved at `path`; None takes pairs."""
    raw = write_causal_lm(
        path.parent / f"{path.name}-raw",
        **({"auto": AutoModelForSequenceClassification, "num_labels": 1} if classifier else {}),
    )
    processing = (
        {"chat_template": {"add_generation_prompt": True}} if chat_template and "add_gen" in chat_template else None
    )
    transformer = Transformer(
        str(raw),
        transformer_task="sequence-classification" if classifier else "text-generation",
        processor_kwargs={"chat_template": chat_template} if chat_template else None,
        processing_kwargs=processing,
    )
    modules = [transformer]
    if not classifier:
        yes, no = (transformer.tokenizer.convert_tokens_to_ids(word) for word in ("yes", "no"))
        modules.append(LogitScore(yes, no if false_token else None))
    model = CrossEncoder(
        modules=modules,
        prompts=prompts,
        default_prompt_name=default_prompt_name,
        activation_fn=activation_fn,
        device="cpu",
    )
    model.save_pretrained(str(path), create_model_card=False)
    return path

"""Trains the shipped SentencePiece model.

    python scripts/train_tokenizer.py

Writes rlt_jax/data/assets/tokenizer/tokenizer.model (512 pieces, byte fallback, digits
apart) from the texts of the embedded task and of the shipped templates.
"""

from pathlib import Path

import sentencepiece

from rlt_jax.data import tokenizer
from rlt_jax.data.tasks import arithmetic
from rlt_jax.data.templates import load_template

KINDS = {"careful": 0.3, "skipping": 0.3, "restating": 0.3, "wrong": 0.1}


def main() -> None:
    """Trains on a deterministic corpus and writes the model."""
    rlt, tiny = load_template("rlt"), load_template("tiny")
    traces = arithmetic.traces(
        arithmetic.TraceConfig("train", 2000, 0, KINDS, known_answer=False)
    )
    corpus = [text for t in traces for text in (t.problem.question, t.explanation)]
    for template in (rlt, tiny):
        corpus += [template.teacher_system, template.student_system] * 50
    tags = [*tiny.explanation_tags, *tiny.thought_tags, *tiny.solution_tags]
    roles = ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
    target = Path(tokenizer.SHIPPED["embedded"]) / "tokenizer"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus),
        model_prefix=str(target),
        vocab_size=512,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        user_defined_symbols=["\n", *roles, *tags],
        pad_id=0,
        unk_id=1,
        bos_id=-1,
        eos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    target.with_suffix(".vocab").unlink()


if __name__ == "__main__":
    main()

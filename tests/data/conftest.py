"""Published tokenizers, read once for all tests of the folder."""

import json
import shutil
from pathlib import Path

import pytest

from rlt_jax.data.tokenizer import Tokenizer, load_tokenizer


@pytest.fixture(scope="session")
def deepseek(shared: Path) -> Tokenizer:
    folder = shared / "data" / "tokenizers" / "deepseek_r1"
    if not folder.is_dir():
        pytest.skip("the deepseek_r1 tokenizer is not there")
    return load_tokenizer(folder)


@pytest.fixture(scope="session")
def sentencepiece_32k(
    shared: Path, tmp_path_factory: pytest.TempPathFactory
) -> Tokenizer:
    file = shared / "data" / "tokenizers" / "sentencepiece_32k" / "tokenizer.model"
    if not file.is_file():
        pytest.skip("the sentencepiece_32k tokenizer is not there")
    folder = tmp_path_factory.mktemp("sentencepiece_32k")
    shutil.copyfile(file, folder / "tokenizer.model")
    chat = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    config = {"eos_token": "</s>", "chat_template": chat}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return load_tokenizer(folder)

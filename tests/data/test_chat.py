"""Chat templates render what transformers renders; turns end as the template ends them."""

import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from rlt_jax.data.chat import ChatTemplate, Message
from rlt_jax.data.tokenizer import Tokenizer, load_tokenizer
from rlt_jax.errors import UserError

transformers = pytest.importorskip("transformers")

SPECIAL = [
    *["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|endoftext|>"],
    *["<|eot_id|>", "<|head|>", "<start_of_turn>", "<end_of_turn>", "[INST]"],
    *["[/INST]", "<think>", "</think>"],
]
CHATML = (
    "{%- for m in messages %}\n"
    "    {{- '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n"
    "    {{- '<|im_start|>assistant\\n' }}\n"
    "{%- endif %}\n"
)
# Short ones in the style of published models.
LLAMA_3 = (
    "{{- bos_token }}\n"
    "{%- if not date_string is defined %}\n"
    "    {%- if strftime_now is defined %}\n"
    "        {%- set date_string = strftime_now('%d %b %Y') %}\n"
    "    {%- else %}\n"
    "        {%- set date_string = '26 Jul 2024' %}\n"
    "    {%- endif %}\n"
    "{%- endif %}\n"
    "{%- if messages[0]['role'] == 'system' %}\n"
    "    {%- set system_message = messages[0]['content']|trim %}\n"
    "    {%- set messages = messages[1:] %}\n"
    "{%- else %}\n"
    "    {%- set system_message = '' %}\n"
    "{%- endif %}\n"
    "{{- '<|head|>system\\n\\nToday Date: ' + date_string + '\\n\\n' }}\n"
    "{{- system_message + '<|eot_id|>' }}\n"
    "{%- if tools is not none %}\n    {{- tools | tojson(indent=4) }}\n{%- endif %}\n"
    "{%- for m in messages %}\n"
    "    {{- '<|head|>' + m['role'] + '\\n\\n' + m['content'] | trim + '<|eot_id|>' }}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n    {{- '<|head|>assistant\\n\\n' }}\n{%- endif %}\n"
)
QWEN_3 = CHATML.removesuffix("{%- endif %}\n") + (
    "    {%- if enable_thinking is defined and enable_thinking is false %}\n"
    "        {{- '<think>\\n\\n</think>\\n\\n' }}\n"
    "    {%- endif %}\n"
    "{%- endif %}"
)
GEMMA_2 = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate') }}{% endif %}"
    "{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\\n' + m['content'] | trim + '<end_of_turn>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\\n'}}{% endif %}"
)
DEEPSEEK = (
    "{% set ns = namespace(system='') %}"
    "{%- for m in messages %}{%- if m['role'] == 'system' %}"
    "{% set ns.system = m['content'] %}{%- endif %}{%- endfor %}"
    "{{ bos_token }}{{ ns.system }}"
    "{%- for m in messages %}"
    "{%- if m['role'] == 'user' %}{{ '<|head|>User' + m['content'] }}{%- endif %}"
    "{%- if m['role'] == 'assistant' %}"
    "{% set content = m['content'] %}"
    "{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}"
    "{% endif %}{{ '<|head|>Assistant' + content + eos_token }}{%- endif %}"
    "{%- endfor %}"
    "{% if add_generation_prompt %}{{ '<|head|>Assistant<think>\\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}"
    "{% endif %}{% endfor %}"
)
SMOL = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}"
    "{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>\\n' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
JSON = (
    "{% for m in messages %}{{ m | tojson }}{{ eos_token }}{% endfor %}"
    "{{ {'a': ['<', 'é', None, 1.5]} | tojson(indent=2) }}"
)
TEMPLATES = {
    "chatml": CHATML,
    "llama_3": LLAMA_3,
    "qwen_3": QWEN_3,
    "gemma_2": GEMMA_2,
    "deepseek": DEEPSEEK,
    "mistral": MISTRAL,
    "smol": SMOL,
    "json": JSON,
}
SYSTEM = {"role": "system", "content": " Be <brief> & 'kind'. \n"}
USER = {"role": "user", "content": ' Wie groß ist\n\n<x> & "y"? 🦉 '}
ANSWER = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nIt is 7. "}
CHATS = [[USER], [SYSTEM, USER], [USER, ANSWER, USER], [SYSTEM, USER, ANSWER, USER]]


def save(folder: Path, **config: Any) -> Path:
    """A byte-level tokenizer with the special tokens of many models."""
    folder.mkdir(exist_ok=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: i for i, char in enumerate(alphabet)} | {"an": 256, "Ġan": 257}
    built = tokenizers.Tokenizer(models.BPE(vocab, [("a", "n"), ("Ġ", "an")]))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    built.post_processor = processors.ByteLevel(trim_offsets=True)
    built.add_special_tokens(SPECIAL)
    built.save(str(folder / "tokenizer.json"))
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    known = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(known | tokens | config))
    return folder


def reference(folder: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(folder)


def assert_renders_alike(
    folder: Path, chats: Sequence[Sequence[Message]], **options: Any
) -> Tokenizer:
    """Our text and ids are those of transformers; what it refuses is refused."""
    theirs, rendered = reference(folder), 0
    ours = load_tokenizer(folder, chat_template_kwargs=options)
    for chat in chats:
        for opened in (True, False):
            try:
                text = theirs.apply_chat_template(
                    list(chat), tokenize=False, add_generation_prompt=opened, **options
                )
            except (jinja2.TemplateError, AttributeError):
                with pytest.raises(UserError, match="chat template fails"):
                    ours.chat.render(chat, open_turn=opened)
                continue
            assert ours.chat.render(chat, open_turn=opened) == text
            ids = theirs(text, add_special_tokens=False)["input_ids"]
            assert ours.encode(text).ids.tolist() == ids
            rendered += 1
    assert rendered
    return ours


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_chat_is_rendered_as_transformers_does(name: str, tmp_path: Path) -> None:
    assert_renders_alike(save(tmp_path, chat_template=TEMPLATES[name]), CHATS)


VARIABLES = (
    "{% for x in [bos_token, eos_token, pad_token, image_token, sep_token] %}"
    "[{{ x }}]{% endfor %}{{ tools is none }}{{ documents is none }}"
    "{{ add_generation_prompt }}{{ messages | length }}"
)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"bos_token": None},
        {"pad_token": "<|endoftext|>"},
        {"image_token": "[INST]"},
        {"extra_special_tokens": {"image_token": "[INST]"}},
        {"extra_special_tokens": ["[INST]"]},
    ],
)
def test_special_tokens_are_variables(config: dict[str, Any], tmp_path: Path) -> None:
    assert_renders_alike(save(tmp_path, chat_template=VARIABLES, **config), CHATS)


def test_special_tokens_may_stand_in_a_map_of_their_own(tmp_path: Path) -> None:
    save(tmp_path, chat_template=VARIABLES)
    bos = {"content": "<|head|>", "lstrip": False, "rstrip": False, "normalized": False}
    tokens = {"eos_token": "<|im_end|>", "bos_token": bos, "pad_token": "</s>"}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(tokens))
    ours = assert_renders_alike(tmp_path, CHATS)
    assert ours.render([USER]).startswith("[<|head|>][<|im_end|>][</s>]")
    # Where the config lists the added tokens, it has the last word.
    listed = {"258": {"content": "<s>", "special": True}}
    save(tmp_path, chat_template=VARIABLES, added_tokens_decoder=listed)
    ours = assert_renders_alike(tmp_path, CHATS)
    assert ours.render([USER]).startswith("[<s>][</s>][]")


@pytest.mark.parametrize(
    ("template", "options"),
    [
        (QWEN_3, {"enable_thinking": False}),
        (QWEN_3, {"enable_thinking": True}),
        (LLAMA_3, {"date_string": "1 Jan 2020"}),
        (LLAMA_3, {"tools": [{"type": "function", "function": {"name": "é<f>"}}]}),
        ("{{ function }}{{ args | length }}", {"function": "f", "args": [1]}),
        (MISTRAL, {"bos_token": "", "eos_token": "<|endoftext|>"}),
        (
            "{{ effort }}{{ n + 1 }}{{ xs | tojson }}",
            {"effort": "x", "n": 1, "xs": [1]},
        ),
    ],
)
def test_the_run_may_set_variables(
    template: str, options: dict[str, Any], tmp_path: Path
) -> None:
    ours = assert_renders_alike(
        save(tmp_path, chat_template=template), CHATS, **options
    )
    assert ours.variables == options
    # A stage keeps them in the folder of the model that it writes.
    save(tmp_path, chat_template=template, chat_template_kwargs=options)
    assert load_tokenizer(tmp_path).render([USER]) == ours.render([USER])
    again = load_tokenizer(tmp_path, chat_template_kwargs={"bos_token": "B", "n": 2})
    assert again.variables == options | {"bos_token": "B", "n": 2}


@pytest.mark.parametrize(
    "template",
    [
        "a\n  {% generation %}\n  b {{ messages | length }}\n  {% endgeneration %}\nc\n",
        "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}",
        (
            "{% for m in messages %}{%- generation -%} {{ loop.index }}{{ m.content }}"
            "{% endgeneration %}{% if loop.index == 2 %}{% break %}{% endif %}{% endfor %}"
        ),
        "{{ messages[0].name }}{{ messages[0].name is defined }}{{ '<&>' }}",
        "{{ messages | tojson(ensure_ascii=true) }}{{ messages | tojson(indent=1) }}",
        "{{ messages | tojson(separators=(',', ':'), sort_keys=true) }}",
        "{% for m in messages %}{{ m.role }}: {{ m.content.strip() }}\n{% endfor %}\n",
        "{{ messages[0].tool.name }}",
        "{% set xs = [] %}{% set _ = xs.append(1) %}{{ messages[0].content }}",
    ],
)
def test_details_of_the_language_are_those_of_transformers(
    template: str, tmp_path: Path
) -> None:
    # One chat is always rendered; some of the templates refuse all others.
    guard = "{% if messages[0].content == 'x' %}x{% else %}" + template + "{% endif %}"
    plain = [{"role": "user", "content": "x"}]
    assert_renders_alike(save(tmp_path, chat_template=guard), [plain, *CHATS])


def listed(**templates: str) -> list[dict[str, str]]:
    return [{"name": name, "template": text} for name, text in templates.items()]


def test_one_of_several_templates_is_chosen_by_name(tmp_path: Path) -> None:
    folder = save(tmp_path, chat_template=listed(default=CHATML, rag="R", tool_use="T"))
    assert_renders_alike(folder, CHATS)
    assert load_tokenizer(folder, "rag").render([USER]) == "R"
    # Files come before the config, as in transformers.
    (folder / "chat_template.jinja").write_text(MISTRAL)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("files\r\n")
    assert_renders_alike(folder, CHATS)
    assert load_tokenizer(folder, "rag").render([USER]) == "files"
    theirs = reference(folder).apply_chat_template
    assert theirs([USER], tokenize=False, chat_template="rag") == "files"


def test_a_list_without_default_needs_a_choice(tmp_path: Path) -> None:
    folder = save(tmp_path, chat_template=listed(rag="R", tool_use=CHATML))
    with pytest.raises(ValueError, match="no default"):
        reference(folder).apply_chat_template([USER])
    with pytest.raises(UserError, match="'default'.*rag, tool_use, chatml"):
        load_tokenizer(folder)
    theirs = reference(folder).apply_chat_template(
        [USER], tokenize=False, add_generation_prompt=True, chat_template="tool_use"
    )
    assert load_tokenizer(folder, "tool_use").render([USER]) == theirs


def test_a_shipped_template_or_a_file_serves_a_base_model(tmp_path: Path) -> None:
    folder = save(tmp_path / "base")
    with pytest.raises(UserError, match="Set model.chat_template .* 'chatml'"):
        load_tokenizer(folder).render([USER])
    chatml = load_tokenizer(folder, "chatml")
    for chat in CHATS:
        text = reference(folder).apply_chat_template(
            chat, tokenize=False, add_generation_prompt=True, chat_template=CHATML
        )
        assert chatml.render(chat) == text
    assert chatml.end_of_turn == "<|im_end|>"
    file = tmp_path / "mine.jinja"
    file.write_text(GEMMA_2)
    assert load_tokenizer(folder, str(file)).end_of_turn == "<end_of_turn>"
    with pytest.raises(UserError, match="no chat template 'chatlm'"):
        load_tokenizer(folder, "chatlm")


def test_a_template_with_an_error_is_named(tmp_path: Path) -> None:
    for template in ("{% if %}", "{% generation %}", "{{ x | no_such_filter }}"):
        folder = save(tmp_path, chat_template=template)
        with pytest.raises(UserError, match="the chat template fails"):
            load_tokenizer(folder)


def test_a_date_is_given_from_outside(tmp_path: Path) -> None:
    folder = save(tmp_path, chat_template=LLAMA_3)
    ours = load_tokenizer(folder, date="2024-02-29T23:59:59+05:00")
    theirs = reference(folder).apply_chat_template(
        [USER], tokenize=False, add_generation_prompt=True, date_string="29 Feb 2024"
    )
    assert ours.render([USER]) == theirs
    today = load_tokenizer(folder).render([USER])
    days = [datetime.date.today() - datetime.timedelta(days=n) for n in (0, 1)]
    assert any(day.strftime("%d %b %Y") in today for day in days)
    with pytest.raises(UserError, match="model.date"):
        load_tokenizer(folder, date="tomorrow")


@pytest.mark.parametrize(
    ("template", "ending", "stops"),
    [
        (CHATML, "<|im_end|>", ["<|im_end|>", "</s>"]),
        (SMOL, "<|im_end|>", ["<|im_end|>", "</s>"]),
        (QWEN_3, "<|im_end|>", ["<|im_end|>", "</s>"]),
        (LLAMA_3, "<|eot_id|>", ["<|eot_id|>", "</s>"]),
        (GEMMA_2, "<end_of_turn>", ["<end_of_turn>", "</s>"]),
        (DEEPSEEK, "</s>", ["</s>"]),
        (MISTRAL, "</s>", ["</s>"]),
        # Llama 2 has a space there, Vicuna no special token at all.
        ("{% for m in messages %} {{ m.content }} </s>{% endfor %}", " </s>", ["</s>"]),
        ("{% for m in messages %}{{ m.content }}\n\n{% endfor %}", "</s>", ["</s>"]),
        (
            "{% for m in messages %}{{ m.content }} END\n{% endfor %}",
            " END</s>",
            ["</s>"],
        ),
        ("{{ messages[0].content }}", "</s>", ["</s>"]),
        # A template that opens the next turn whether it should or not.
        (
            (
                "{% for m in messages %}{{ m.content }}<|im_end|>\n{% endfor %}"
                "<|im_start|>assistant\n"
            ),
            "<|im_end|>",
            ["<|im_end|>", "</s>"],
        ),
        # Only a chat that begins with a system prompt is accepted.
        (
            "{% if messages[0].role != 'system' %}{{ raise_exception('no') }}{% endif %}"
            + CHATML,
            "<|im_end|>",
            ["<|im_end|>", "</s>"],
        ),
    ],
)
def test_a_turn_ends_as_the_template_renders_it(
    template: str, ending: str, stops: list[str], tmp_path: Path
) -> None:
    ours = load_tokenizer(save(tmp_path, chat_template=template))
    assert ours.end_of_turn == ending
    library = reference(tmp_path)
    expected = library.convert_tokens_to_ids(stops)
    assert ours.stop_ids == tuple(sorted(expected))


@pytest.mark.parametrize(
    ("template", "takes"),
    [
        (CHATML, True),
        (LLAMA_3, True),
        (DEEPSEEK, True),
        (GEMMA_2, False),
        (MISTRAL, False),
        ("{{ messages[-1].content }}", False),
        ("{{ messages[0].content | trim }}", True),
    ],
)
def test_a_place_for_a_system_prompt_is_seen_in_what_is_rendered(
    template: str, takes: bool, tmp_path: Path
) -> None:
    assert load_tokenizer(save(tmp_path, chat_template=template)).takes_system == takes


def test_the_longest_special_token_ends_a_turn(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.content }}</s>>{% endfor %}"
    folder = save(tmp_path, chat_template=template)
    file = folder / "tokenizer.json"
    library = tokenizers.Tokenizer.from_file(str(file))
    library.add_special_tokens(["</s>>"])
    library.save(str(file))
    ours = load_tokenizer(folder)
    assert ours.end_of_turn == "</s>>"
    assert ours.stop_ids == (ours.eos_id, library.token_to_id("</s>>"))


def test_halves_of_characters_are_refused() -> None:
    date = datetime.datetime(2024, 1, 1)
    template = ChatTemplate("x", '{{ "\\ud800" }}', {}, date)
    with pytest.raises(UserError, match="the chat template fails: .*surrogates"):
        template.render([{"role": "user", "content": "q"}])

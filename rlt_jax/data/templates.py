"""Templates: the system prompts, tags and delimiters of teacher and student sequences.

A template is data, read from a JSON file with the fields of `Template`. A solution stands
between its tags unchanged. So does an explanation, except that its text always begins with
`pad`, which belongs to the teacher's prompt: with `pad="\\n\\n"`, the plain text `x = 5`
becomes the body `"\\n\\nx = 5\\n\\n"`.

    teacher: chat(teacher_system, q) + <solution> s </solution> + teacher_delimiter
             + <explanation> pad | rest of the explanation + </explanation>
    student: chat(student_system, q) + thought_prefix + <thought> z </thought> + delimiter
             + <solution> s </solution>

Everything left of `|` is the teacher's prompt.
"""

import dataclasses
import re
from itertools import permutations
from pathlib import Path
from typing import Annotated

from rlt_jax import stores
from rlt_jax.data.chat import Message
from rlt_jax.errors import UserError, as_user_error
from rlt_jax.files import read_json
from rlt_jax.ranges import Checked, Condition, OneOf
from rlt_jax.records import Problem, Trace
from rlt_jax.settings import build

ASSETS = Path(__file__).parent / "assets" / "templates"
Tag = Annotated[str, Condition("not only whitespace", str.strip)]
PRIVILEGED = """{question}

A solution of it, as a reference for you alone:

{solution}

Now answer the question yourself, step by step."""


@dataclasses.dataclass(frozen=True)
class Template(Checked):
    """System prompts, tags and delimiters; see the module docstring.

    Attributes:
      teacher_system: system prompt of the teacher.
      student_system: system prompt of the student.
      explanation_tags: opening and closing tag of the teacher's explanation.
      thought_tags: opening and closing tag of the student's thought.
      solution_tags: opening and closing tag of the solution.
      pad: whitespace between the tags of an explanation or thought and its text.
      delimiter: text between the two tagged parts.
      teacher_delimiter: the same in the teacher's sequences; None for `delimiter`.
      teacher_solution_tags: likewise for `solution_tags`.
      thought_prefix: text before the opening tag of the student's thought.
      system_role: where system prompts go: "system", a message of their own; "user", in
        front of the first user's message; "auto", the latter where the model's chat
        template has no place for a system message (Gemma 2).
      privileged: the question as a teacher reads it that judges a student's attempt (see
        `privileged.py`), with {question} and {solution} in it.
    """

    teacher_system: str
    student_system: str
    explanation_tags: tuple[Tag, Tag]
    thought_tags: tuple[Tag, Tag]
    solution_tags: tuple[Tag, Tag]
    pad: str
    delimiter: str
    teacher_delimiter: str | None = None
    teacher_solution_tags: tuple[Tag, Tag] | None = None
    thought_prefix: str = ""
    system_role: Annotated[str, OneOf(("system", "user", "auto"))] = "system"
    privileged: str = PRIVILEGED

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("solution_tags", "delimiter"):
            if getattr(self, f"teacher_{name}") is None:
                object.__setattr__(self, f"teacher_{name}", getattr(self, name))
        for place in ("{question}", "{solution}"):
            if place not in self.privileged:
                raise UserError(f"template: privileged has no {place}.")
        teacher = self.teacher_solution_tags + self.explanation_tags
        student = self.thought_tags + self.solution_tags
        for tag, other in (*permutations(teacher, 2), *permutations(student, 2)):
            if tag in other:
                raise UserError(f"template: the tag {tag!r} stands in {other!r}, too.")

    def body(self, text: str) -> str:
        """An explanation as it stands between its tags, padded unless it already is."""
        return text if text.startswith(self.pad) else self.pad + text + self.pad

    def messages(self, role: str, problem: Problem, as_system: bool) -> list[Message]:
        """Chat messages of the teacher or the student before its turn.

        Args:
          role: "teacher" or "student".
          problem: the question, after the turns before it.
          as_system: whether the system prompt is a message of its own.
        """
        turns = [*problem.history, ("user", problem.question)]
        messages = [{"role": name, "content": text} for name, text in turns]
        system = self.system(role)
        if system and as_system:
            return [{"role": "system", "content": system}, *messages]
        if system:
            first = next(m for m in messages if m["role"] == "user")
            first["content"] = f"{system}\n\n{first['content']}"
        return messages

    def system(self, role: str) -> str:
        """System prompt of a role."""
        return self.teacher_system if role == "teacher" else self.student_system

    def teacher_prefix(self, problem: Problem) -> str:
        """Start of the teacher's turn that belongs to its prompt."""
        solution = problem.solution.join(self.teacher_solution_tags)
        return solution + self.teacher_delimiter + self.explanation_tags[0] + self.pad

    def teacher_turn(self, explanation: str, closed: bool = True) -> str:
        """The teacher's turn after `teacher_prefix`: the explanation, its closing tag."""
        text = self.body(explanation).removeprefix(self.pad)
        return text + self.explanation_tags[1] if closed else text

    def privileged_question(self, problem: Problem) -> str:
        """The question with what a teacher is shown, which is the problem's solution."""
        texts = {"{question}": problem.question, "{solution}": problem.solution}
        return re.sub("|".join(texts), lambda found: texts[found[0]], self.privileged)

    def student_turn(self, trace: Trace, opened: str = "") -> str:
        """The student's turn: tagged thought, delimiter, tagged solution.

        Args:
          trace: problem and explanation.
          opened: the thought's opening tag and what follows it, where these end the
            prompt already; "" where the student generates them.
        """
        body = self.body(trace.explanation)
        start = self.thought_prefix + self.thought_tags[0] + body
        if opened:
            space = opened.removeprefix(self.thought_tags[0])
            shared = [n for n in range(len(space) + 1) if space.endswith(body[:n])]
            start = body[shared[-1] :]
        return start + self.after_thought(trace.problem)

    def after_thought(self, problem: Problem) -> str:
        """The student's turn from the closing tag of its thought on."""
        solution = problem.solution.join(self.solution_tags)
        return self.thought_tags[1] + self.delimiter + solution

    def parse_completion(self, completion: str) -> tuple[str, bool]:
        """Body of the explanation in a teacher's completion, and whether it is closed.

        The completion continues `teacher_prefix`, so the body starts with `pad`. It ends
        at the first closing tag; without one, all of the completion belongs to it.

            >>> template.parse_completion("3+4=7\\n\\n</explanation>")   # pad "\\n\\n"
            ("\\n\\n3+4=7\\n\\n", True)
        """
        text, tag, _ = completion.partition(self.explanation_tags[1])
        return self.pad + text, bool(tag)

    def solution_of(self, completion: str) -> str | None:
        """The solution in a student's completion: the last tagged part, stripped.

        A missing closing tag is forgiven; None when there is no opening tag.
        """
        _, tag, text = completion.rpartition(self.solution_tags[0])
        return text.partition(self.solution_tags[1])[0].strip() if tag else None

    def thought_of(self, completion: str) -> str | None:
        """The student's first whole thought, None when there is none."""
        _, _, rest = completion.partition(self.thought_tags[0])
        text, closed, _ = rest.partition(self.thought_tags[1])
        return text if closed else None

    def own_thought(self, completion: str) -> str:
        """The student's thought, or what there is of it; without a tag, everything."""
        _, opened, rest = completion.partition(self.thought_tags[0])
        return (rest if opened else completion).partition(self.thought_tags[1])[0]


def load_template(name: str) -> Template:
    """Reads a template by the name of a shipped one or the path of a JSON file.

    Raises:
      UserError: no such file, not JSON, or a field is missing, unknown or invalid.
    """
    shipped = {path.stem: path for path in sorted(ASSETS.glob("*.json"))}
    path = shipped.get(name, Path(stores.local(name)))
    with as_user_error(f"template {name[:99]!r}", OSError):
        if not path.is_file():
            raise UserError(
                f"template {name!r} is neither a file nor one of the shipped "
                f"({', '.join(shipped)})."
            )
    with as_user_error(f"template {path}", UserError, end=""):
        return build(Template, read_json(path), "it")

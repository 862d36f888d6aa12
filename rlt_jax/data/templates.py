"""Templates: the system prompts, tags and delimiters of teacher and student sequences.

A template is data, read from a JSON file with exactly the fields of `Template`. A solution
stands between its tags unchanged. So does an explanation, except that its text always
begins with `pad`, which belongs to the teacher's prompt: with `pad="\\n\\n"`, the plain
text `x = 5` becomes the body `"\\n\\nx = 5\\n\\n"`.

    teacher: chat(teacher_system, q) + <solution> s </solution> + delimiter
             + <explanation> pad | rest of the explanation + </explanation>
    student: chat(student_system, q) + <thought> z </thought> + delimiter
             + <solution> s </solution>

Everything left of `|` is the teacher's prompt.
"""

import dataclasses
import json
from pathlib import Path

from rlt_jax.errors import UserError
from rlt_jax.records import Problem, Trace

ASSETS = Path(__file__).parent / "assets" / "templates"


@dataclasses.dataclass(frozen=True)
class Template:
    """System prompts, tags and delimiters; see the module docstring.

    Attributes:
      teacher_system: system prompt of the teacher.
      student_system: system prompt of the student.
      explanation_tags: opening and closing tag of the teacher's explanation.
      thought_tags: opening and closing tag of the student's thought.
      solution_tags: opening and closing tag of the solution.
      pad: whitespace between the tags of an explanation or thought and its text.
      delimiter: text between the two tagged parts.
    """

    teacher_system: str
    student_system: str
    explanation_tags: tuple[str, str]
    thought_tags: tuple[str, str]
    solution_tags: tuple[str, str]
    pad: str
    delimiter: str

    def __post_init__(self) -> None:
        for name in ("explanation_tags", "thought_tags", "solution_tags"):
            tags = getattr(self, name)
            if len(tags) != 2 or not all(isinstance(t, str) and t for t in tags):
                raise UserError(
                    f"template: {name} is {tags!r}; give an opening and a closing tag."
                )
            object.__setattr__(self, name, tuple(tags))

    def body(self, text: str) -> str:
        """An explanation as it stands between its tags, padded unless it already is."""
        if text.startswith(self.pad):
            return text
        return self.pad + text + self.pad

    def solution(self, problem: Problem) -> str:
        """The solution of the problem with its tags."""
        return problem.solution.join(self.solution_tags)

    def teacher_messages(self, problem: Problem) -> list[dict[str, str]]:
        """Chat messages of the teacher before its turn."""
        return _chat(self.teacher_system, problem.question)

    def student_messages(self, question: str) -> list[dict[str, str]]:
        """Chat messages of the student before its turn."""
        return _chat(self.student_system, question)

    def teacher_prefix(self, problem: Problem) -> str:
        """Start of the teacher's turn that belongs to its prompt."""
        opening = self.explanation_tags[0] + self.pad
        return self.solution(problem) + self.delimiter + opening

    def student_turn(self, trace: Trace) -> str:
        """The student's whole turn: tagged thought, delimiter, tagged solution."""
        thought = self.body(trace.explanation).join(self.thought_tags)
        return thought + self.delimiter + self.solution(trace.problem)

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
        _, opened, rest = completion.partition(self.thought_tags[0])
        text, closed, _ = rest.partition(self.thought_tags[1])
        return text if opened and closed else None


def load_template(name: str) -> Template:
    """Reads a template by the name of a shipped one or the path of a JSON file.

    Raises:
      UserError: no such file, not JSON, or a field is missing or unknown.
    """
    shipped = {path.stem: path for path in sorted(ASSETS.glob("*.json"))}
    path = shipped.get(name, Path(name))
    if not path.is_file():
        raise UserError(
            f"template {name!r} is neither a file nor one of the shipped "
            f"({', '.join(shipped)})."
        )
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"template {path}: not valid JSON: {error}") from error
    wanted = {field.name for field in dataclasses.fields(Template)}
    if not isinstance(fields, dict) or set(fields) != wanted:
        found = sorted(fields) if isinstance(fields, dict) else fields
        raise UserError(
            f"template {path}: the fields must be exactly {sorted(wanted)}, not {found}."
        )
    return Template(**fields)


def _chat(system: str, question: str) -> list[dict[str, str]]:
    messages = [{"role": "system", "content": system}] if system else []
    return messages + [{"role": "user", "content": question}]

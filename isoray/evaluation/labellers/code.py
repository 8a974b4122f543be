"""Code: whether a text is source code or prose, by the shapes of its lines and words. Needs no model.

Ours, since no light library tells the two apart. Each line votes with its characters: one that is a statement in a
common language for code, any other word by word, where a word of letters is prose, and an identifier, a call or an
operator is code. The side with more weight wins. Numbers, bare punctuation, addresses and single comments do not vote.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

from isoray.evaluation.labellers.base import Label, Labeller

CODE, PROSE = "code", "prose"
STATEMENT_WEIGHT = 5.0
"""What a character of a statement weighs, against 1 of a word of prose: docstrings stand between statements, while
there is next to no statement in prose."""
STATEMENT_CHARS = 20
"""A shorter statement weighs as much as one of so many characters: `}` and `else:` tell as much as a long one."""
SHAPE_WEIGHT = 4.0
"""What a character of an identifier, call or operator weighs, where the line is no statement."""
LONGEST_STATEMENT = 160
"""Longer lines are taken word by word: most are paragraphs."""

STATEMENTS = (
    # Blocks of Python, Ruby and shell.
    r"(async )?def \w+.*|class \w+(\(.*)?:|(if|elif|while|for|with|except|case|async \w+) .*:|(else|try|finally):",
    r"(if|elif|while) .*; ?(then|do)|(pass|break|continue|return|end|fi|done|esac|else|begin)\b ?;?",
    r"@\w+[.(].*|@(property|Override)",
    # Imports and declarations.
    r"from [\w.]+ import .*|import [\w.]+( as \w+)?(, [\w. ]+)*;?|import .* from ['\"].*",
    r"# ?(include|define|if|endif).*",
    r"((public|private|protected|static|const|let|var|function|func|fn|impl|struct|enum|interface|namespace|package|use|"
    r"using|typedef|template|extern|pub|mod|type|void|unsigned|int|char|bool|float|double|final|export)\b ?)+"
    r"[\w<>\[\]*&:.]*( [\w<>*&]+){0,2} ?([={(].*|;)",
    r"(SELECT|INSERT INTO|CREATE (TABLE|INDEX|VIEW)|UPDATE|DELETE FROM|ALTER TABLE|DROP TABLE) .*",
    # Assignments, calls, entries of a dictionary, and what stands alone behind `return` and its like.
    r"[\w.$*&][\w.$*&@\[\]\"'()-]*(, [\w.*]+)*(: ?[\w.]+(\[.*\])?)? ?"
    r"([-+*/|&^%:.]|//|\*\*|<<|>>|\|\|)?=(?!=) ?[^\s=].*",
    r"[\w.$]+((\.|::|->)\w+)*\(.*\);?|(return|yield|raise|assert|await|del|throw) [^\s,.]+[;:]?",
    r"(\"[^\"]*\"|'[^']*') ?: ?(\S.*)?[\w\"')}\]\[{],?|[a-z-]+: ?[^\s;][^;]*;",
    # Brackets that open or close a line.
    r"[\])}]+[\]}),;.]*|} ?\w+.*{|.*\) ?(-> ?.*|: ?\w+ ?)?{|.*(\w\(|[=,>] ?[(\[])|.*=> ?{?|.*\w\(.*[\])}]\)*;",
    # Prompts, tags, docstrings.
    r"(>>>|\$) \S.*|</?\w[\w:-]*( [\w:@.-]+=.*)?/?>|<!\w.*|<\?.*|[rbfu]{0,2}(\"\"\".*|'''[^']*)",
)
STATEMENT = re.compile("|".join(f"(?:{pattern})" for pattern in STATEMENTS))
SHAPES = (
    r"[a-zA-Z0-9]_[a-zA-Z0-9]|__\w+__|\b_[a-z]\w*\b(?!_)|\b[a-z]{2,}[A-Z][a-z]",  # snake_case, camelCase
    r"\b[A-Za-z_]\w*\.[a-z_]\w+|\w(::|->)\w|[)\]]\.\w",  # attributes
    r"\w\((?!\w{1,2}\))|\(\)|\[\]|\{\}|\w\[(?!\d+\])|\)\)|\w\{",  # calls and subscripts
    r"[=!<>]=|->|=>|:=|&&|\|\||[-+*/]=|\b[A-Za-z_]\w*=[\"'\w(\[{-]",  # operators, keyword arguments
    r"^['\"][\w.-]*['\"]:|\$[a-zA-Z_{(]|\\[nt]\b|%[sd]\b|\b0x[0-9a-fA-F]|</\w|<\w+$|/>$",  # entries, escapes, tags
)
SHAPE = re.compile("|".join(SHAPES))
COMMENT = re.compile(r"#+( |$)|//|/\*|\*/")
NO_VOTE = re.compile(r"<\w+>$|://|www\.|@\w|\.(com|org|net|edu)\b|&#?\w+;|[\[{]\w+[\]}]|[-=_*.]{3}|\[\^")
"""Placeholders such as `<unk>`, addresses, rulers, marks of footnotes."""
LETTERS = re.compile(r"[^\W\d_]{2,}")


class Code(Labeller):
    """`code` or `prose`, by which has the larger share of the votes of lines and words.

    The confidence is that share: 1 where all agree, 0.5 (`prose`) where there is no vote. A text that is both, such as
    an article with examples, or a docstring, goes by what there is more of; mathematics in TeX, log files and tables of
    identifiers can be taken for code.
    """

    class Config(Labeller.Config):
        """Code or prose."""

        kind: Literal["code"] = "code"
        """Code or prose, by the shapes of lines and words."""

    config: Config

    def label(self, texts: Sequence[str]) -> list[Label]:
        """The label of each text."""
        labels = []
        for text in texts:
            code, prose = votes(text)
            name = CODE if code > prose else PROSE
            labels.append(Label(name, max(code, prose) / (code + prose) if code + prose else 0.5))
        return labels


def votes(text: str) -> tuple[float, float]:
    """The weights of code and of prose in ``text``, in characters of prose."""
    code = prose = 0.0
    after_comment = False
    for line in text.splitlines():
        line = line.strip()
        comment = COMMENT.match(line) is not None
        if comment and not STATEMENT.fullmatch(line):
            # A comment alone may be a heading in Markdown; several in a row are none.
            code += len(line) if after_comment else 0
        elif len(line) <= LONGEST_STATEMENT and STATEMENT.fullmatch(line):
            code += STATEMENT_WEIGHT * max(STATEMENT_CHARS, len(line.replace(" ", "")))
        else:
            for word in line.split():
                if NO_VOTE.search(word):
                    continue
                if SHAPE.search(word):
                    code += SHAPE_WEIGHT * len(word)
                else:
                    prose += sum(map(len, LETTERS.findall(word)))
        after_comment = comment
    return code, prose

"""Every claim of the paper as a checked statement."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from tailscope.paper.claims_accuracy import figure3, table1
from tailscope.paper.claims_geometry import figures4to8
from tailscope.paper.evidence import Evidence
from tailscope.paper.verdicts import Claim


def check(evidence: Evidence) -> list[Claim]:
    """Return every claim that the results bear on, with its statistic and its verdict, in the order of the paper."""
    return [*table1(evidence), *figure3(evidence), *figures4to8(evidence)]


def document(evidence: Evidence, claims: Sequence[Claim], created: str) -> dict[str, Any]:
    """Return the contents of `claims.json`."""
    first = next(iter(evidence.results.values()))
    return {
        "schema": "tailscope.claims/1",
        "created": created,
        "dataset": evidence.dataset,
        "recipe": dict(evidence.recipe),
        "seeds": first["seeds"],
        "spec": first["spec"],
        "claims": [claim.to_json() for claim in claims],
    }


def tally(claims: Sequence[Mapping[str, Any]]) -> str:
    """Return how many claims hold, fail and are undecided.

    >>> tally([{"verdict": "holds"}, {"verdict": "holds"}, {"verdict": "fails"}])
    '2 hold, 1 fails, 0 undecided'
    """
    n = Counter(claim["verdict"] for claim in claims)
    holds, fails = ("holds" if n["holds"] == 1 else "hold"), ("fails" if n["fails"] == 1 else "fail")
    return f"{n['holds']} {holds}, {n['fails']} {fails}, {n['undecided']} undecided"

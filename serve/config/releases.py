"""Releases of Triton: what is known of NVIDIA's images."""

# From NVIDIA's "Release Compatibility Matrix", docs/introduction/compatibility.md of triton-inference-server/server,
# read in August 2026. It states TensorRT for the TensorRT-LLM image only; the support matrix of the plain image was not
# at hand.
TENSORRT = {
    "26.07": "10.14.1.48",
    "26.06": "10.14.1.48",
    "26.05": "10.14.1.48",
    "26.04": "10.14.1.48",
    "26.03": "10.14.1.48",
    "26.02": "10.13.3.9",
    "26.01": "10.13.3.9",
    "25.12": "10.13.3.9",
    "25.11": "10.13.3.9",
    "25.10": "10.11.0.33",
    "25.09": "10.11.0.33",
    "25.08": "10.11.0.33",
    "25.07": "10.10.0.31",
    "25.06": "10.10.0.31",
    "25.05": "10.9.0.34",
    "25.04": "10.9.0.34",
    "25.03": "10.9.0.34",
    "25.02": "10.8.0.43",
    "25.01": "10.8.0.43",
    "24.12": "10.7.0",
    "24.11": "10.6.0",
    "24.10": "10.4.0",
}
"""TensorRT in nvcr.io/nvidia/tritonserver:RELEASE-trtllm-python-py3; a plan is loaded by the version that made it."""

CARRIED = "24.10"
"""The release whose server `serve install` brings."""
CLOSED = "26.07"
"""A release without those below."""
OPEN_CVES = {
    "25.05": (
        "2025-23321",
        "2025-23322",
        "2025-23323",
        "2025-23324",
        "2025-23325",
        "2025-23326",
        "2025-23327",
        "2025-23335",
    ),
    "25.06": ("2025-23331",),
    "25.07": (
        *("2025-23310", "2025-23311", "2025-23317", "2025-23318", "2025-23319", "2025-23320"),
        *("2025-23333", "2025-23334"),
    ),
    "25.08": ("2025-23316", "2025-23328", "2025-23329", "2025-23336"),
    "25.09": ("2025-33202",),
    "25.10": ("2025-33201", "2025-33211"),
    "26.01": ("2025-33238", "2025-33254", "2026-24158"),
    "26.02": ("2026-24146", "2026-24147", "2026-24173", "2026-24174", "2026-24175"),
    "26.03": ("2026-24206", "2026-24207", "2026-24208", "2026-24209", "2026-24210", "2026-47487"),
    "26.04": ("2026-24264", "2026-24266"),
    "26.05": (*("2026-47476", "2026-47477", "2026-47478", "2026-47479", "2026-47480", "2026-47481", "2026-47482"),),
    "26.06": ("2026-47606", "2026-47627", "2026-47628", "2026-47629", "2026-47630"),
}
"""CVEs of NVIDIA's bulletins that hold for the carried server, by the release that closed them; read in August 2026."""
GRAVEST = {
    "2025-23310": "a flood of one-byte HTTP chunks ends the server, or worse",
    "2025-23311": "the same, by another path",
    "2025-23316": "the model control API runs code through a model's name",
    "2025-23317": "a reverse shell through the HTTP server",
    "2026-24206": "rated 9.8",
    "2026-24207": "rated 9.8",
    "2026-47627": "rated 9.8",
}
"""Those rated above 9 of 10, and what is known of them."""


def open_cves(release: str) -> list[str]:
    """Return the CVEs above that a release, as in `26.05`, still has."""
    return [cve for closed, cves in OPEN_CVES.items() if release < closed for cve in cves]


def same(version: str, other: str) -> bool:
    """Compare two versions of TensorRT as far as the shorter one goes, three numbers at least, as some in the table."""
    one, two = version.split("."), other.split(".")
    length = max(3, min(len(one), len(two)))
    return one[:length] == two[:length]

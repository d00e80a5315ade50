"""The parts of Kubernetes' and JobSet's schemas that the how-to pages use, written down: what is required (``!``), what
kind each value is of. A field that is not listed is taken for a mistake."""

from typing import Any, Final

POD: Final[dict[str, Any]] = {
    "restartPolicy!": ("Never", "OnFailure", "Always"),
    "terminationGracePeriodSeconds": int,
    "securityContext": {"runAsNonRoot": bool, "runAsUser": int, "fsGroup": int},
    "containers!": [
        {
            "name!": str,
            "image!": str,
            "command": [str],
            "args": [str],
            "ports": [{"containerPort!": int}],
            "resources": {"limits": dict, "requests": dict},
            "volumeMounts": [{"name!": str, "mountPath!": str}],
        }
    ],
    "volumes": [{"name!": str, "persistentVolumeClaim": {"claimName!": str}, "emptyDir": {"medium": ("", "Memory")}}],
}

JOBSET: Final[dict[str, Any]] = {
    "apiVersion!": ("jobset.x-k8s.io/v1alpha2",),
    "kind!": ("JobSet",),
    "metadata!": {"name!": str},
    "spec!": {
        "failurePolicy": {"maxRestarts": int},
        "network": {"enableDNSHostnames": bool, "subdomain": str},
        "replicatedJobs!": [
            {
                "name!": str,
                "replicas": int,
                "template!": {
                    "spec!": {
                        "parallelism": int,
                        "completions": int,
                        "completionMode": ("Indexed", "NonIndexed"),
                        "backoffLimit": int,
                        "template!": {"spec!": POD},
                    }
                },
            }
        ],
    },
}


def check(value: Any, schema: Any, path: str = "") -> None:
    """Raises: AssertionError, naming the place."""
    if isinstance(schema, dict):
        assert isinstance(value, dict), f"{path} is a map"
        fields = {name.rstrip("!"): kind for name, kind in schema.items()}
        assert not value.keys() - fields.keys(), f"{path}: {value.keys() - fields.keys()}"
        missing = {name.rstrip("!") for name in schema if name.endswith("!")} - value.keys()
        assert not missing, f"{path}: {missing} is missing"
        for name, item in value.items():
            check(item, fields[name], f"{path}.{name}")
    elif isinstance(schema, list):
        assert isinstance(value, list) and value, f"{path} is a list"
        for number, item in enumerate(value):
            check(item, schema[0], f"{path}[{number}]")
    elif isinstance(schema, tuple):
        assert value in schema, f"{path}: {value!r} is none of {schema}"
    else:
        assert type(value) is schema, f"{path}: {value!r}"

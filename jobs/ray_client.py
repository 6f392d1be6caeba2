"""Ray's job client, bound to the head that was looked at."""

from typing import Any

from ray.job_submission import JobSubmissionClient

CONNECT_S, ANSWER_S = 5.0, 60.0


class Client(JobSubmissionClient):
    """Asks as `orchestrator.group.access` does: within a time, through no proxy, and with Ray's token alone.

    Ray's own client waits for ever, and `requests` would send the token to a proxy of the environment, or replace it by
    what ~/.netrc has for the host.
    """

    def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
        return super()._do_request(
            method,
            endpoint,
            timeout=(CONNECT_S, ANSWER_S),
            proxies={"no_proxy": "*"},
            auth=lambda request: request,
            **options,
        )

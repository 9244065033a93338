#!/usr/bin/env python3
"""Exit code 0 if every port of this container that is given answers.

health.py PORT ...                       a connection is taken
health.py --http PORT ca.crt PORT ...    the first one says 200 to GET /health over TLS
"""

import http.client
import socket
import ssl
import sys

LIMIT_S = 4.0


def main(arguments: list[str]) -> int:
    if arguments[0] == "--http":
        _, port, ca, *arguments = arguments
        # An expired certificate is found here; names are for callers from outside.
        context = ssl.create_default_context(cafile=ca)
        context.check_hostname = False
        link = http.client.HTTPSConnection("127.0.0.1", int(port), timeout=LIMIT_S, context=context)
        link.request("GET", "/health")
        if (status := link.getresponse().status) != 200:
            print(f"GET /health: {status}")
            return 1
    for port in arguments:
        socket.create_connection(("127.0.0.1", int(port)), LIMIT_S).close()
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except OSError as error:
        print(error)
        sys.exit(1)

"""`python -m handler.batch.child FD`: a worker in a separate process, whose methods are called over
the socket FD. Only `handler.batch.process` starts it."""

import pickle
import sys
from collections.abc import Iterator
from multiprocessing.connection import Connection

from handler.batch.shard import Worker


def main() -> None:
    connection = Connection(int(sys.argv[1]))
    try:
        worker = Worker(connection.recv())
        connection.send(("last", None))
        while True:
            method, arguments = connection.recv()
            answer = getattr(worker, method)(*arguments)
            if isinstance(answer, Iterator):
                for item in answer:
                    connection.send(("item", item))
                answer = None
            connection.send(("last", answer))
    except (EOFError, BrokenPipeError):
        return  # the caller has ended
    except Exception as error:
        connection.send(("error", pickle.dumps(error)))


if __name__ == "__main__":
    main()

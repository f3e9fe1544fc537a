"""A server for flows that start jobs."""

from tests.support import prefect_server

prefect_home, real_server = prefect_server.prefect_home, prefect_server.real_server
served = prefect_server.served

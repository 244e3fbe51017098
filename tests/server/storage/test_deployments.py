"""Deployments, pinned host keys and the audit, as they are stored."""

from dataclasses import replace

import pytest
from sqlalchemy import Connection
from tests.support.stored import make_agent, make_key

from fleetwire_server.model import AuditEntry, Deployment, DeploymentHost, DeploymentStatus, HostKey, HostStatus
from fleetwire_server.storage import agents, audit, deployments, host_keys


def make_host(host: str = "web-01", **fields: object) -> DeploymentHost:
    return replace(DeploymentHost(host=host, port=22, ssh_user="root", label=host, profile="manage"), **fields)  # type: ignore[arg-type]


def make_deployment(deployment_id: str = "dep_1", *hosts: DeploymentHost, **fields: object) -> Deployment:
    made = Deployment(
        id=deployment_id,
        status=DeploymentStatus.RUNNING,
        created_at=100.0,
        created_by="ada",
        hosts=hosts or (make_host(),),
    )
    return replace(made, **fields)  # type: ignore[arg-type]


def make_host_key(**fields: object) -> HostKey:
    made = HostKey(
        host="web-01", port=22, public_key="ssh-ed25519 A", fingerprint="SHA256:a", pinned_at=1.0, pinned_by="ada"
    )
    return replace(made, **fields)  # type: ignore[arg-type]


def test_a_deployment_is_returned_as_it_was_and_as_it_became(connection: Connection) -> None:
    made = make_deployment("dep_1", make_host("b"), make_host("a"))
    deployments.add_deployment(connection, made)
    assert deployments.get_deployment(connection, "dep_1") == made
    assert deployments.get_deployment(connection, "dep_2") is None
    ended = make_host("a", status=HostStatus.FAILED, step="check", reason="no_python", detail="so", finished_at=5.0)
    deployments.update_host(connection, "dep_1", 1, ended)
    deployments.finish_deployment(connection, "dep_1", DeploymentStatus.FINISHED, 6.0)
    assert deployments.get_deployment(connection, "dep_1") == replace(
        made, hosts=(make_host("b"), ended), status=DeploymentStatus.FINISHED, finished_at=6.0
    )


def test_the_last_are_listed_with_how_their_hosts_ended(connection: Connection) -> None:
    ends = [HostStatus.WAITING, HostStatus.DEPLOYED, HostStatus.DEPLOYED, HostStatus.FAILED, HostStatus.INTERRUPTED]
    hosts = [make_host(f"h{number}", status=status) for number, status in enumerate(ends)]
    deployments.add_deployment(connection, make_deployment("dep_1", *hosts))
    for number in range(2, 5):
        deployments.add_deployment(connection, make_deployment(f"dep_{number}"))
    listed = deployments.list_deployments(connection, 4)
    assert [each.id for each in listed] == ["dep_4", "dep_3", "dep_2", "dep_1"]
    assert (listed[-1].hosts, listed[-1].deployed, listed[-1].failed) == (5, 2, 2)
    assert [each.id for each in deployments.list_deployments(connection, 2)] == ["dep_4", "dep_3"]


def test_what_was_running_is_interrupted_and_its_agents_that_never_came_are_removed(connection: Connection) -> None:
    for number in (1, 2, 3):
        agent = make_agent(f"agent_{number}", last_seen=50.0 if number == 2 else None)
        agents.add_agent(connection, agent, make_key(f"key{number}", f"agent_{number}"))
    running = [make_host(f"h{number}", status=HostStatus.RUNNING, agent_id=f"agent_{number}") for number in (1, 2)]
    ended = make_host("ended", status=HostStatus.FAILED)
    deployments.add_deployment(connection, make_deployment("dep_1", *running, ended, make_host("waiting")))
    over = make_deployment("dep_2", make_host(agent_id="agent_3"), status=DeploymentStatus.FINISHED)
    deployments.add_deployment(connection, over)
    assert deployments.interrupt_running(connection, 200.0) == ["agent_1"]
    assert [agent.id for agent in agents.list_agents(connection)] == ["agent_2", "agent_3"]
    found = deployments.get_deployment(connection, "dep_1")
    assert found is not None
    assert (found.status, found.finished_at) == (DeploymentStatus.INTERRUPTED, 200.0)
    assert [(host.status, host.agent_id) for host in found.hosts] == [
        (HostStatus.INTERRUPTED, None),
        (HostStatus.INTERRUPTED, "agent_2"),
        (HostStatus.FAILED, None),
        (HostStatus.INTERRUPTED, None),
    ]
    assert deployments.get_deployment(connection, "dep_2") == over
    assert deployments.interrupt_running(connection, 300.0) == []


def test_old_deployments_leave_and_running_ones_stay(connection: Connection) -> None:
    for number in range(6):
        status = DeploymentStatus.RUNNING if number == 0 else DeploymentStatus.FINISHED
        deployments.add_deployment(connection, make_deployment(f"dep_{number}", status=status))
    assert deployments.delete_old(connection, 2, 2) == 2
    assert deployments.delete_old(connection, 2, 2) == 1
    assert [each.id for each in deployments.list_deployments(connection, 9)] == ["dep_5", "dep_4", "dep_0"]


def test_how_a_deployment_ended_stays_when_its_agent_is_deleted(connection: Connection) -> None:
    agents.add_agent(connection, make_agent(), make_key())
    deployments.add_deployment(connection, make_deployment("dep_1", make_host(agent_id="agent_1")))
    agents.delete_agent(connection, "agent_1")
    found = deployments.get_deployment(connection, "dep_1")
    assert found is not None
    assert found.hosts[0].agent_id == "agent_1"


def test_the_first_key_of_a_host_stays_until_it_is_removed(connection: Connection) -> None:
    first = make_host_key()
    assert host_keys.pin_host_key(connection, first) is first
    assert host_keys.pin_host_key(connection, make_host_key(fingerprint="SHA256:b")) == first
    other_port = make_host_key(port=2222, fingerprint="SHA256:c")
    assert host_keys.pin_host_key(connection, other_port) is other_port
    assert host_keys.list_host_keys(connection) == [first, other_port]
    assert host_keys.delete_host_key(connection, "web-01", 22)
    assert not host_keys.delete_host_key(connection, "web-01", 22)
    assert host_keys.get_host_key(connection, "web-01", 22) is None


def test_what_is_done_is_recorded_and_what_fails_is_not(connection: Connection) -> None:
    entry = AuditEntry(at=1.0, actor="ada", action="agent.enrolled", subject="agent_1", detail={"label": "wéb"})

    def fail(_: Connection) -> None:
        raise ZeroDivisionError

    assert audit.audited(lambda _: 7, entry)(connection) == 7
    for number in range(4):
        audit.add_entry(connection, replace(entry, at=2.0 + number))
    with pytest.raises(ZeroDivisionError):
        audit.audited(fail, entry)(connection)
    listed = audit.list_entries(connection, 10)
    assert [each.at for each in listed] == [5.0, 4.0, 3.0, 2.0, 1.0]
    assert replace(listed[-1], sequence=0) == entry
    assert audit.list_entries(connection, 2, listed[1].sequence) == listed[2:4]
    assert audit.delete_old(connection, 3, 1) == 1
    assert audit.delete_old(connection, 3, 9) == 1
    assert len(audit.list_entries(connection, 10)) == 3

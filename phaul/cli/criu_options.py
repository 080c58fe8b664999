"""Every option that CRIU 4.2 knows, and what phaul does with it.

The one place where this is said: the parsers of `dump`, `restore` and `check` are made from it, and
`phaul.cli.criu_syntax` takes from it what to accept, to drop and to refuse. Names, short forms and values are
CRIU's (criu(8)).
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Option:
    """One long option.

    Attributes:
        value: how its value is called: "" for a flag (which also has a --no- form), in brackets when the value may
            be left out.
        does: the commands that do what it says.
        refuses: the commands that end with an error: there it would change what happens, and phaul does not do it
            yet. For all other commands it is taken and dropped: it has no meaning for them, or cannot change the
            outcome (`dropped` says why).
        accepts: values that are taken even so, as they ask for what phaul does anyway.
    """

    name: str
    short: str = ""
    value: str = ""
    does: tuple[str, ...] = ()
    refuses: tuple[str, ...] = ()
    accepts: tuple[str, ...] = ()
    help: str = ""
    dropped: str = field(default="", repr=False)

    @property
    def takes_value(self) -> bool:
        return bool(self.value)

    @property
    def value_is_optional(self) -> bool:
        return self.value.startswith("[")

    @property
    def dest(self) -> str:
        """Its name in the namespace of argparse."""
        return self.name.replace("-", "_")


DUMP, RESTORE, CHECK = ("dump",), ("restore",), ("check",)
BOTH = DUMP + RESTORE
ALL = BOTH + CHECK

_PERMISSION = "a permission: what phaul cannot do is refused with it as without it"
_PAGE_SERVER = "means something to a page server only"
_WHOLE = "every dump is whole: no parent is needed to restore it"
_HOW = "only how CRIU does its work, not what comes out"

OPTIONS = (
    # What and where
    Option("tree", "t", "PID", does=DUMP, help="root of the tree"),
    Option("images-dir", "D", "DIR", does=BOTH, help="where the images are (default .)"),
    Option("work-dir", "W", "DIR", does=BOTH, help="where the log and the pidfile go (default: with the images)"),
    Option("log-file", "o", "FILE", does=BOTH, help="write the log there"),
    Option("verbosity", "v", "[LEVEL]", does=BOTH, help="0 nothing, 1 errors, 2 warnings (default), 3 more, 4 all"),
    Option("pidfile", "", "FILE", does=RESTORE, help="write the PID of the root there; must not exist"),
    Option("config", "", "FILE", does=ALL, help="read options from there, one a line, without dashes"),
    Option("no-default-config", does=ALL, help="read no configuration file but that of --config"),
    Option("action-script", "", "FILE", does=BOTH, help="program to run at each stage (may be repeated)"),
    Option("close", "", "FD", does=ALL, help="close this descriptor first (may be repeated)"),
    Option("log-pid", dropped="there is one log"),
    Option("display-stats", dropped="statistics are no outcome"),
    Option("status-fd", "", "FD", dropped=_PAGE_SERVER),
    Option("libdir", "L", "DIR", dropped="what only a plugin of CRIU can dump is refused"),
    Option("deprecated", dropped="nothing is deprecated"),
    Option("unprivileged", dropped=_PERMISSION),
    # The tree, before and after
    Option("leave-running", "R", does=DUMP, help="let the tree go on afterwards"),
    Option("leave-stopped", "s", does=BOTH, help="leave the tree stopped (SIGSTOP) afterwards"),
    Option("restore-detached", "d", does=RESTORE, help="do not wait for the tree"),
    Option("restore-sibling", "S", does=RESTORE, help="with -d: the root becomes a child of our parent"),
    Option("shell-job", "j", does=BOTH, help="the tree may share a session or process group with us"),
    Option("exec-cmd", refuses=RESTORE),
    Option("timeout", "", "SECONDS", dropped="stopping a tree never waits for one of its tasks to run"),
    Option("freeze-cgroup", "", "PATH", refuses=DUMP),
    # Memory
    Option("track-mem", dropped=_WHOLE),
    Option("prev-images-dir", "", "DIR", dropped=_WHOLE),
    Option("auto-dedup", dropped=_WHOLE),
    Option("pre-dump-mode", "", "MODE", dropped=_WHOLE),
    Option("lazy-pages", refuses=BOTH),
    Option("stream", refuses=BOTH),
    Option("page-server", refuses=DUMP),
    Option("address", "", "ADDRESS", dropped=_PAGE_SERVER),
    Option("port", "", "PORT", dropped=_PAGE_SERVER),
    Option("ps-socket", "", "FD", refuses=DUMP),
    Option("daemon", dropped=_PAGE_SERVER),
    Option("tls", dropped=_PAGE_SERVER),
    Option("tls-cacert", "", "FILE", dropped=_PAGE_SERVER),
    Option("tls-cacrl", "", "FILE", dropped=_PAGE_SERVER),
    Option("tls-cert", "", "FILE", dropped=_PAGE_SERVER),
    Option("tls-key", "", "FILE", dropped=_PAGE_SERVER),
    Option("tls-no-cn-verify", dropped=_PAGE_SERVER),
    # Sockets and files
    Option("tcp-established", does=BOTH, help="established TCP connections are moved, too"),
    Option("tcp-close", does=BOTH, help="established TCP connections come back closed"),
    Option("skip-in-flight", does=DUMP, help="connections that were not yet accepted are left behind"),
    Option("network-lock", "", "METHOD", does=BOTH, help="drop packets of the connections meanwhile, or `skip` that"),
    Option(
        "ext-unix-sk",
        "x",
        "[INODE]",
        does=DUMP,
        help="datagram sockets may be connected to a name outside the tree",
    ),
    Option("file-locks", "l", does=DUMP, help="take locks and leases on files along"),
    Option("link-remap", does=DUMP, help="deleted files with other names get one more, until the restore"),
    Option("ghost-limit", "", "SIZE", does=DUMP, help="largest deleted file that is taken along (default 1M)"),
    Option("ghost-fiemap", dropped=_HOW),
    Option("evasive-devices", dropped=_PERMISSION),
    Option("force-irmap", dropped=_HOW),
    Option("irmap-scan-path", "", "PATH", dropped=_HOW),
    Option("file-validation", "", "METHOD", refuses=BOTH, accepts=("buildid",)),
    Option("skip-file-rwx-check", dropped="permissions of files are not compared"),
    Option("external", "", "RESOURCE", refuses=BOTH),
    Option("inherit-fd", "", "RESOURCE", refuses=RESTORE),
    Option("allow-uprobes", dropped=_PERMISSION),
    Option("cpu-cap", "", "[WHAT]", refuses=BOTH, accepts=("none",)),
    # Namespaces, mounts and cgroups
    Option("root", "r", "PATH", refuses=BOTH, accepts=("/",)),
    Option("join-ns", "J", "NAMESPACE", refuses=RESTORE),
    Option("empty-ns", "", "KIND", refuses=BOTH),
    Option("veth-pair", "", "PAIR", refuses=RESTORE),
    Option("ext-mount-map", "M", "MAP", refuses=BOTH),
    Option("enable-external-sharing", refuses=DUMP),
    Option("enable-external-masters", refuses=DUMP),
    Option("enable-fs", "", "NAMES", dropped=_PERMISSION),
    Option("skip-mnt", "", "PATH", refuses=BOTH),
    Option("mntns-compat-mode", dropped=_HOW),
    Option("weak-sysctls", dropped=_PERMISSION),
    Option("lsm-profile", "", "PROFILE", refuses=RESTORE),
    Option("lsm-mount-context", "", "CONTEXT", refuses=RESTORE),
    Option("manage-cgroups", "", "[MODE]", refuses=BOTH, accepts=("ignore",)),
    Option("cgroup-root", "", "PATH", refuses=RESTORE),
    Option("cgroup-props", "", "PROPERTIES", refuses=DUMP),
    Option("cgroup-props-file", "", "FILE", refuses=DUMP),
    Option("cgroup-dump-controller", "", "NAME", refuses=DUMP),
    Option("cgroup-yard", "", "PATH", refuses=BOTH),
    # Check
    Option("feature", "", "NAME", does=CHECK, help="only this one of CRIU's names (`list`: which there are)"),
    Option("extra", refuses=CHECK),
    Option("experimental", refuses=CHECK),
    Option("all", refuses=CHECK),
    Option("ms", refuses=CHECK),
)

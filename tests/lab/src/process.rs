//! The daemon under test as a process of its own: the real binary, in the
//! network namespace of its pod, with its own `/tmp` and `/etc/hosts`. It does
//! not outlive the test, whatever becomes of it.

use std::collections::{BTreeMap, VecDeque};
use std::ffi::{CStr, CString};
use std::fmt::Write as _;
use std::fs;
use std::io::{self, BufRead, BufReader, PipeReader, Write as _};
use std::net::IpAddr;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, bounded};
use meridio_proxy::health::client::Probe;
use meridio_proxy::sync::clock;
use meridio_proxy::sync::thread::{STACK_LARGE, STACK_SMALL, ThreadHandle, Threads};
use parking_lot::{Condvar, Mutex};
use serde_json::Value;

use crate::netns::{self, Netns, check};

/// Lines of the log that are kept; the oldest ones go first.
const LINES: usize = 50_000;

/// The lines of a process's log as they come, for tests that start it without
/// a lab: the newest are dropped when nobody takes them. The thread is to be
/// dropped after the process has ended, which ends its output.
///
/// # Errors
///
/// When the thread cannot be started. It panics at a line that is not JSON.
pub fn json_lines(output: ChildStdout) -> io::Result<(Receiver<Value>, ThreadHandle)> {
    let (tx, lines) = bounded(1000);
    let reader = Threads::unsupervised().spawn("reader", STACK_LARGE, move |_| {
        for line in BufReader::new(output).lines().map_while(Result::ok) {
            let line = serde_json::from_str(&line).expect("each line is JSON");
            let _ = tx.try_send(line);
        }
    })?;
    Ok((lines, reader))
}

/// What to run, and where.
#[derive(Debug, Clone)]
pub struct DaemonOptions {
    pub binary: PathBuf,
    pub args: Vec<String>,
    /// The whole environment.
    pub env: BTreeMap<String, String>,
    pub netns: Netns,
    /// Names that the daemon can resolve.
    pub hosts: Vec<(IpAddr, String)>,
    /// Also write the log to this file, one after the other's.
    pub log: Option<PathBuf>,
    /// The soft and the hard limit of descriptors; else those of the test.
    pub descriptors: Option<(u64, u64)>,
    /// Holds the pod's `/tmp` and `/etc/hosts`, kept over restarts as an
    /// emptyDir volume is.
    pub dir: PathBuf,
}

/// The running daemon; dropping it kills it.
pub struct Daemon {
    shared: Arc<Shared>,
    pid: u32,
    tmp: PathBuf,
    _threads: [ThreadHandle; 2],
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    lines: VecDeque<String>,
    /// Lines that were dropped from the front.
    dropped: usize,
    /// The last line was read. The end may be known before.
    is_read: bool,
    exit: Option<ExitStatus>,
}

impl Daemon {
    /// Starts the binary.
    pub fn start(options: &DaemonOptions) -> io::Result<Self> {
        let tmp = options.dir.join("tmp");
        fs::create_dir_all(&tmp)?;
        let hosts = options.dir.join("hosts");
        fs::write(&hosts, hosts_file(&options.hosts))?;
        let (reader, writer) = io::pipe()?;
        // The pod's `/tmp` hides a checkout that lies below it, so the binary
        // is shown elsewhere.
        let program = options.dir.join("proxy");
        fs::File::create(&program)?;
        let binary = fs::canonicalize(&options.binary).map_err(|error| {
            let binary = options.binary.display();
            io::Error::new(error.kind(), format!("start {binary}: {error}"))
        })?;
        let mut command = Command::new(&program);
        command
            .args(&options.args)
            .env_clear()
            .envs(&options.env)
            .current_dir("/")
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(writer.try_clone()?)
            .stderr(writer);
        let pod = Pod::new(
            &options.netns,
            options.descriptors,
            [
                (&binary, &program),
                (&hosts, Path::new("/etc/hosts")),
                (&tmp, Path::new("/tmp")),
            ],
        )?;
        // SAFETY: the closure makes system calls only, on memory that was
        // prepared before the fork.
        unsafe { command.pre_exec(move || pod.enter()) };

        let shared = Arc::new(Shared {
            state: Mutex::new(State::default()),
            changed: Condvar::new(),
        });
        let (tx, started) = bounded(1);
        let threads = Threads::unsupervised();
        let (waiter, log) = (Arc::clone(&shared), Arc::clone(&shared));
        // The process dies with the thread that started it, so that thread
        // stays for as long as the process lives.
        let wait = threads.spawn("daemon-wait", STACK_SMALL, move |_| {
            run(command, &tx, &waiter);
        })?;
        let mut copy = match &options.log {
            Some(path) => Some(fs::File::options().create(true).append(true).open(path)?),
            None => None,
        };
        let read = threads.spawn("daemon-log", STACK_SMALL, move |_| {
            log.read(reader, copy.as_mut());
            log.state.lock().is_read = true;
            log.changed.notify_all();
        })?;
        let pid = started.recv().map_err(io::Error::other)?.map_err(|error| {
            let binary = options.binary.display();
            io::Error::new(error.kind(), format!("start {binary}: {error}"))
        })?;
        Ok(Self {
            shared,
            pid,
            tmp,
            _threads: [wait, read],
        })
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Sends a signal, unless it has ended.
    pub fn signal(&self, signal: i32) -> io::Result<()> {
        let state = self.shared.state.lock();
        if state.exit.is_some() {
            return Ok(());
        }
        // SAFETY: kill takes no pointers; the process is not yet reaped, since
        // that happens under the lock, so the number is still its own.
        check(unsafe { libc::kill(self.pid as libc::pid_t, signal) })
    }

    /// Kills it without any warning and waits for its end.
    pub fn kill(&self) -> io::Result<()> {
        self.signal(libc::SIGKILL)?;
        match self.wait_exit(Duration::from_secs(10)) {
            Some(_) => Ok(()),
            None => Err(io::Error::other("the killed daemon does not end")),
        }
    }

    /// Asks it to stop, as Kubernetes does, and waits for its end.
    #[must_use]
    pub fn terminate(&self, limit: Duration) -> Option<ExitStatus> {
        let _ = self.signal(libc::SIGTERM);
        self.wait_exit(limit)
    }

    /// How it ended, if it does within `limit`.
    #[must_use]
    pub fn wait_exit(&self, limit: Duration) -> Option<ExitStatus> {
        self.shared.wait(limit, |state| state.exit)
    }

    /// Whether it has not ended.
    #[must_use]
    pub fn is_running(&self) -> bool {
        self.shared.state.lock().exit.is_none()
    }

    /// The lines that it wrote.
    #[must_use]
    pub fn lines(&self) -> Vec<String> {
        self.shared.state.lock().lines.iter().cloned().collect()
    }

    /// The last lines, for a message about a failure.
    #[must_use]
    pub fn tail(&self, lines: usize) -> String {
        let all = self.lines();
        all[all.len().saturating_sub(lines)..].join("\n")
    }

    /// How many lines it has written so far.
    #[must_use]
    pub fn line_count(&self) -> usize {
        let state = self.shared.state.lock();
        state.dropped + state.lines.len()
    }

    /// The first line, from number `since` on, that `wanted` accepts, if it
    /// comes within `limit` and before the log's end.
    #[must_use]
    pub fn wait_line(
        &self,
        since: usize,
        wanted: impl Fn(&str) -> bool,
        limit: Duration,
    ) -> Option<String> {
        let mut next = since;
        let found = self.shared.wait(limit, |state| {
            let skip = next.saturating_sub(state.dropped);
            let found = (state.lines.iter().skip(skip)).find(|line| wanted(line));
            next = state.dropped + state.lines.len();
            found
                .map(|line| Some(line.clone()))
                .or(state.is_read.then_some(None))
        });
        found.flatten()
    }

    /// Asks the health server once, as the pod's probes do.
    pub fn health(&self, service: &str) -> Result<(), String> {
        let socket = self.tmp.join("health.sock");
        let args = [
            format!("-addr=unix://{}", socket.display()),
            format!("-service={service}"),
            "-connect-timeout=400ms".to_owned(),
            "-rpc-timeout=400ms".to_owned(),
        ];
        Probe::parse(args.into_iter().map(Into::into))
            .and_then(|probe| probe.run())
            .map_err(|error| error.to_string())
    }

    /// Asks again and again until the answer is SERVING, or `limit` has
    /// passed, or the daemon has ended; the last answer says why.
    pub fn wait_health(&self, service: &str, limit: Duration) -> Result<(), String> {
        let deadline = clock::now() + limit;
        loop {
            let Err(answer) = self.health(service) else {
                return Ok(());
            };
            // The period of a probe, cut short by the daemon's end.
            let ended = self.wait_exit(Duration::from_millis(100));
            if ended.is_some() || clock::now() >= deadline {
                return Err(format!("{service:?}: {answer}; daemon: {ended:?}"));
            }
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.signal(libc::SIGKILL);
    }
}

impl Shared {
    fn read(&self, pipe: PipeReader, mut copy: Option<&mut fs::File>) {
        for line in BufReader::new(pipe).split(b'\n') {
            let Ok(mut line) = line else { return };
            if let Some(file) = copy.as_mut() {
                line.push(b'\n');
                // The copy is for a reader; the test does not depend on it.
                let _ = file.write_all(&line);
                line.pop();
            }
            let mut state = self.state.lock();
            if state.lines.len() == LINES {
                state.lines.pop_front();
                state.dropped += 1;
            }
            let line = String::from_utf8_lossy(&line).into_owned();
            state.lines.push_back(line);
            self.changed.notify_all();
        }
    }

    fn wait<R>(&self, limit: Duration, mut found: impl FnMut(&State) -> Option<R>) -> Option<R> {
        let deadline = clock::now() + limit;
        let mut state = self.state.lock();
        loop {
            if let Some(result) = found(&state) {
                return Some(result);
            }
            if self.changed.wait_until(&mut state, deadline).timed_out() {
                return found(&state);
            }
        }
    }
}

/// The thread of the process: starts it, waits for its end, says how it was.
fn run(mut command: Command, started: &Sender<io::Result<u32>>, shared: &Shared) {
    let child = command.spawn();
    // Closes this side's end of the pipe.
    drop(command);
    let mut child = match child {
        Ok(child) => child,
        Err(error) => {
            let _ = started.try_send(Err(error));
            return;
        }
    };
    let _ = started.try_send(Ok(child.id()));
    wait_unreaped(&child);
    let mut state = shared.state.lock();
    state.exit = child.wait().ok();
    shared.changed.notify_all();
}

/// Waits for the end and leaves the number in use.
fn wait_unreaped(child: &Child) {
    loop {
        // SAFETY: an all-zero siginfo_t is a valid value, which waitid writes.
        let done = unsafe {
            let mut info: libc::siginfo_t = std::mem::zeroed();
            let flags = libc::WEXITED | libc::WNOWAIT;
            libc::waitid(libc::P_PID, child.id(), &raw mut info, flags)
        };
        if done == 0 || io::Error::last_os_error().kind() != io::ErrorKind::Interrupted {
            return;
        }
    }
}

fn hosts_file(hosts: &[(IpAddr, String)]) -> String {
    let mut text = "127.0.0.1 localhost\n::1 localhost\n".to_owned();
    for (address, name) in hosts {
        let _ = writeln!(text, "{address} {name}");
    }
    text
}

/// What a child enters before it becomes the daemon.
struct Pod {
    netns: Netns,
    descriptors: Option<libc::rlimit>,
    binds: [(CString, CString); 3],
}

impl Pod {
    /// `binds`: what is shown where.
    fn new(
        netns: &Netns,
        descriptors: Option<(u64, u64)>,
        binds: [(&Path, &Path); 3],
    ) -> io::Result<Self> {
        let text = |path: &Path| CString::new(path.as_os_str().as_bytes());
        let bind = |(from, to)| Ok::<_, io::Error>((text(from)?, text(to)?));
        let [program, hosts, tmp] = binds;
        Ok(Self {
            netns: netns.clone(),
            descriptors: descriptors
                .map(|(rlim_cur, rlim_max)| libc::rlimit { rlim_cur, rlim_max }),
            binds: [bind(program)?, bind(hosts)?, bind(tmp)?],
        })
    }

    /// Async-signal-safe: system calls only.
    fn enter(&self) -> io::Result<()> {
        // SAFETY: prctl and unshare take no pointers here.
        unsafe {
            check(libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL))?;
            check(libc::unshare(libc::CLONE_NEWNS))?;
        }
        if let Some(limit) = &self.descriptors {
            // SAFETY: setrlimit reads the live `limit`.
            check(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, limit) })?;
        }
        netns::enter(self.netns.raw())?;
        mount(None, c"/", None, libc::MS_REC | libc::MS_PRIVATE)?;
        for (from, to) in &self.binds {
            mount(Some(from), to, None, libc::MS_BIND)?;
        }
        // It shows the interfaces of the namespace that mounts it.
        mount(Some(c"sysfs"), c"/sys", Some(c"sysfs"), libc::MS_RDONLY)?;
        Ok(())
    }
}

fn mount(
    from: Option<&CStr>,
    to: &CStr,
    kind: Option<&CStr>,
    flags: libc::c_ulong,
) -> io::Result<()> {
    let raw = |text: Option<&CStr>| text.map_or(std::ptr::null(), CStr::as_ptr);
    // SAFETY: all three are null, where the kind of mount allows it, or
    // strings that end with a zero byte and outlive the call.
    check(unsafe { libc::mount(raw(from), to.as_ptr(), raw(kind), flags, std::ptr::null()) })
}

/// Where the lab copies daemons' logs to: the variable `MERIDIO_LAB_LOG`.
#[must_use]
pub fn log_file() -> Option<PathBuf> {
    std::env::var_os("MERIDIO_LAB_LOG").map(PathBuf::from)
}

/// The daemon's binary: of the variable `MERIDIO_PROXY_BINARY`, or the one
/// that cargo has built beside the running program.
pub fn binary() -> io::Result<PathBuf> {
    if let Some(path) = std::env::var_os("MERIDIO_PROXY_BINARY") {
        return Ok(path.into());
    }
    let program = std::env::current_exe()?;
    let found = (program.ancestors().skip(1).take(2))
        .map(|folder| folder.join("proxy"))
        .find(|path| path.is_file());
    found.ok_or_else(|| {
        io::Error::other(format!(
            "no daemon beside {}: cargo build --bins, or set MERIDIO_PROXY_BINARY",
            program.display()
        ))
    })
}

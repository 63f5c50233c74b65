//! `make demo`: the daemon with its peers and real packets. Exits with 0 only
//! if everything held; leaves nothing behind, also when it is interrupted.

use std::io::Write;
use std::process::ExitCode;

use meridio_lab::{demo, workdir::WorkDir};
use meridio_proxy::sync::thread::{STACK_SMALL, Threads};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

fn main() -> ExitCode {
    let interrupted = Signals::new([SIGINT, SIGTERM, SIGHUP]).map(|mut signals| {
        let handle = signals.handle();
        let thread = Threads::unsupervised().spawn("signals", STACK_SMALL, move |_| {
            if signals.forever().next().is_some() {
                leave();
            }
        });
        (handle, thread)
    });
    let (handle, _thread) = match interrupted {
        Ok((handle, Ok(thread))) => (handle, thread),
        Ok((_, Err(error))) | Err(error) => return fail(&error.to_string()),
    };
    let done = demo::run();
    handle.close();
    match done {
        Ok(verdict) if verdict.held() => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(error) => fail(&error),
    }
}

/// Namespaces and interfaces end with this process, and so does the daemon;
/// only the directory has to be removed.
#[allow(
    clippy::exit,
    reason = "the main thread is busy with a lab that ends here"
)]
fn leave() {
    let _ = writeln!(std::io::stderr(), "demo: interrupted");
    WorkDir::remove_all();
    std::process::exit(130);
}

fn fail(error: &str) -> ExitCode {
    let _ = writeln!(std::io::stderr(), "demo: {error}");
    ExitCode::FAILURE
}

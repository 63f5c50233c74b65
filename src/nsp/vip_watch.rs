//! The `vip-watch` thread: a `WatchVip` stream, opened again whenever it ends.

use std::collections::BTreeSet;
use std::time::Duration;

use crossbeam_channel::{at, never, select};
use ipnetwork::IpNetwork;
use log::{debug, info, warn};
use protobuf::MessageField;

use crate::core::event::Event;
use crate::core::vips::{HOLD, VipAction, VipBook};
use crate::kernel::NetHandle;
use crate::logging::repeats::Repeats;
use crate::proto::nsp::{Trench, Vip, VipResponse};
use crate::rpc::call::Options;
use crate::rpc::method;
use crate::rpc::pump::{self, Item};
use crate::sync::clock;
use crate::sync::stop::Stop;
use crate::transport::client::Connector;
use crate::transport::error::ConnectError;

/// Pause before the next stream (Meridio v1.2.8, cmd/proxy/main.go:322).
const PAUSE: Duration = Duration::from_millis(500);
/// How long a connection is waited for before that is logged.
const PATIENCE: Duration = Duration::from_secs(5);

/// VIPs that come, or go, at a time and are named in the log.
const NAMED_MAX: usize = 100;

/// The thread's state.
pub(super) struct VipWatch {
    connector: Connector,
    net: NetHandle,
    trench: String,
    book: VipBook,
    /// The present stream brought a list.
    had_list: bool,
    /// A warning said that the VIPs cannot be followed.
    is_failing: bool,
    /// Lines about streams that ended: an NSP may tell a list and end, again
    /// and again.
    ends: Repeats,
    /// The VIPs that `net` was told last.
    told: BTreeSet<IpNetwork>,
}

impl VipWatch {
    pub(super) fn new(connector: Connector, net: NetHandle, trench: String) -> Self {
        Self {
            connector,
            net,
            trench,
            book: VipBook::new(),
            had_list: false,
            is_failing: false,
            ends: Repeats::default(),
            told: BTreeSet::new(),
        }
    }

    /// Runs until `stop`.
    pub(super) fn run(mut self, stop: &Stop) {
        loop {
            self.had_list = false;
            let why = self.follow(stop);
            self.book.ended();
            if stop.is_set() {
                return;
            }
            if self.had_list {
                // Streams end with a restart of NSP or a change of the own
                // certificate; that alone is no trouble.
                let line = format!("NSP's stream of VIPs ended, the next one is opened: {why}");
                match self.ends.admit("", clock::now()) {
                    Some(more) => info!("{line}{more}"),
                    None => debug!("{line}"),
                }
            } else if !std::mem::replace(&mut self.is_failing, true) {
                warn!("NSP does not tell the VIPs: {why}; the last ones stay, it is tried again");
            }
            if stop.wait(PAUSE) {
                return;
            }
        }
    }

    /// Follows one stream to its end, and returns why it ended.
    fn follow(&mut self, stop: &Stop) -> String {
        let connection = match self.connector.acquire(clock::now() + PATIENCE, stop) {
            Ok(connection) => connection,
            Err(ConnectError::Deadline(why)) => return format!("no connection to NSP: {why}"),
            Err(ConnectError::Stopped) => return "the connection to NSP was closed".to_owned(),
        };
        let request = request(&self.trench);
        let opened = pump::open(
            connection.channel(),
            &method::WATCH_VIP,
            &request,
            &Options::default(),
        );
        let pump = match opened {
            Ok(pump) => pump,
            Err(error) => return error.to_string(),
        };
        self.book.opened();
        loop {
            let timer = self.book.next_deadline().map_or_else(never, at);
            select! {
                recv(stop.receiver()) -> _ => return "the daemon is stopping".to_owned(),
                recv(pump.items()) -> item => match item {
                    Ok(Item::Message(list)) => self.received(&list),
                    Ok(Item::Ended(Ok(()))) => return "NSP ended the stream".to_owned(),
                    Ok(Item::Ended(Err(error))) => return error.to_string(),
                    Err(_) => return "the stream was given up".to_owned(),
                },
                recv(timer) -> _ => {
                    let action = self.book.tick(clock::now());
                    self.act(action);
                }
            }
        }
    }

    fn received(&mut self, list: &VipResponse) {
        self.had_list = true;
        if std::mem::take(&mut self.is_failing) {
            info!("NSP tells the VIPs again");
        }
        let texts = list.vips.iter().map(|vip| vip.address.as_str());
        let actions = self.book.received(texts, clock::now());
        self.act(actions);
    }

    /// Each VIP that comes or goes, in the words of Meridio's log; the first
    /// ones of many.
    fn log_changes(&self, vips: &BTreeSet<IpNetwork>) {
        for vip in vips.difference(&self.told).take(NAMED_MAX) {
            info!(vip = vip.to_string(); "Add VIP");
        }
        for vip in self.told.difference(vips).take(NAMED_MAX) {
            info!(vip = vip.to_string(); "Delete VIP");
        }
    }

    fn act(&mut self, actions: impl IntoIterator<Item = VipAction>) {
        for action in actions {
            match action {
                VipAction::Tell(vips) => {
                    info!(count = vips.len(); "NSP told the VIPs");
                    self.log_changes(&vips);
                    self.told.clone_from(&vips);
                    self.net.tell(Event::Vips(vips));
                }
                VipAction::Refused { text, fault } => {
                    // The text is NSP's: bounded, and escaped.
                    let shown: String = text.chars().take(64).collect();
                    warn!("VIP {shown:?} is refused: {fault}; the others apply");
                }
                VipAction::RefusedMore(count) => warn!("{count} more VIPs are refused"),
                VipAction::Held => warn!(
                    "NSP begins with an empty list of VIPs; it is not applied unless it stays \
                     so for {HOLD:?}"
                ),
            }
        }
    }
}

/// All VIPs of the trench.
fn request(trench: &str) -> Vip {
    let trench = Trench {
        name: trench.to_owned(),
        ..Trench::default()
    };
    Vip {
        trench: MessageField::some(trench),
        ..Vip::default()
    }
}

//! Reading the monitor stream while a refresh is under way.

use log::info;

use super::words;
use crate::core::event::Event;
use crate::core::lb_session::LbSession;
use crate::kernel::NetHandle;
use crate::nsm::convert::Template;
use crate::nsm::patience::Said;
use crate::proto::connection::{Connection, ConnectionEvent};
use crate::rpc::pump::Item;
use crate::sync::clock;

/// What reading needs of the worker, which is in the call meanwhile.
pub(super) struct Overhearing<'a> {
    pub(super) template: &'a Template,
    pub(super) at_nsmgr: &'a str,
    pub(super) session: &'a mut LbSession<Connection>,
    pub(super) reported: &'a mut Option<Event>,
    pub(super) net: &'a NetHandle,
    /// The item that ended the stream, for after the call.
    pub(super) ended: &'a mut Option<Option<Item<ConnectionEvent>>>,
}

impl Overhearing<'_> {
    pub(super) fn read(&mut self, item: Option<Item<ConnectionEvent>>) -> Said {
        let Some(Item::Message(event)) = item else {
            *self.ended = Some(item);
            return Said::Ended;
        };
        let Some(said) = self.template.monitored(&event, self.at_nsmgr) else {
            return Said::Nothing;
        };
        let Some(fall) = self.session.overheard(said, clock::now()) else {
            return Said::Nothing;
        };
        info!(id = self.template.id; "nsmgr reports during a refresh: {}", words::state(said));
        info!("{fall}");
        *self.reported = Some(fall.clone());
        self.net.tell(fall);
        Said::Fallen
    }
}

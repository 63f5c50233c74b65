//! Bad days of nsmgr, and of those who are reached through it: registry,
//! forwarder, load balancers and targets.

use std::sync::Arc;

use grpcio::RpcStatus;

use super::{Inner, Nsmgr};
use crate::fault::{Fault, Faults, Trouble, dropped};
use crate::lb::Lb;
use crate::target::Target;
use meridio_proxy::rpc::status::RpcError;
use std::time::Instant;

/// What calls meet on their way.
#[derive(Default)]
pub(super) struct Troubles {
    nsmgr: Trouble,
    registry: Trouble,
    forwarder: Trouble,
}

impl Troubles {
    /// Lets a call of `method` through, at once or later. A Request passes the
    /// registry by: nsmgr knows where the endpoints of its own node are.
    pub(super) fn admit(&self, method: &str, deadline: Instant) -> Result<(), RpcError> {
        self.nsmgr.admit(deadline)?;
        if method.starts_with("/registry.") {
            self.registry.admit(deadline)
        } else {
            self.forwarder.admit(deadline)
        }
    }

    /// Lets a stream of `method` be opened.
    pub(super) fn admit_stream(&self, method: &str) -> Result<(), RpcError> {
        self.nsmgr.admit_stream()?;
        if method.starts_with("/registry.") {
            self.registry.admit_stream()
        } else {
            Ok(())
        }
    }
}

/// nsmgr keeps nothing on disk: to restart and to forget are one.
impl Faults for Nsmgr {
    fn inflict(&mut self, fault: &Fault) -> Result<(), String> {
        let inner = self.inner();
        match fault {
            Fault::Pause => inner.peers.hold(true),
            Fault::Kill => self.stop(),
            Fault::Restart | Fault::Forget => self.restart()?,
            Fault::Late(_) => inner.troubles.nsmgr.set(Some(fault.clone())),
            Fault::Refuse(status) => {
                inner.troubles.nsmgr.set(Some(fault.clone()));
                inner.end_finds(status);
                inner.monitors.end_streams(status);
            }
            Fault::DropStreams => self.drop_streams(),
        }
        Ok(())
    }

    fn recover(&mut self) -> Result<(), String> {
        let inner = self.inner();
        inner.troubles.nsmgr.set(None);
        inner.peers.hold(false);
        let runs = inner.listener.lock().is_some();
        if runs { Ok(()) } else { self.restart() }
    }
}

/// The registry behind nsmgr. Its watches are silent while it pauses.
pub struct RegistryProcess(Nsmgr);

impl Faults for RegistryProcess {
    fn inflict(&mut self, fault: &Fault) -> Result<(), String> {
        let inner = self.0.inner();
        if fault.lasts() {
            inner.troubles.registry.set(Some(fault.clone()));
        }
        match fault {
            Fault::Pause | Fault::Late(_) => {}
            Fault::Refuse(status) => inner.end_finds(status),
            Fault::Kill | Fault::Restart | Fault::DropStreams => inner.end_finds(&dropped()),
            Fault::Forget => {
                inner.registry.forget();
                inner.end_finds(&dropped());
            }
        }
        Ok(())
    }

    /// The load balancers register again at once, as their own refresh does
    /// sooner or later.
    fn recover(&mut self) -> Result<(), String> {
        let inner = self.0.inner();
        inner.troubles.registry.set(None);
        inner.keep_lbs()
    }
}

/// The forwarder: nsmgr says DOWN of its connections when it ends. Interfaces
/// stay, and a new one takes them over.
pub struct ForwarderProcess(Nsmgr);

impl Faults for ForwarderProcess {
    fn inflict(&mut self, fault: &Fault) -> Result<(), String> {
        let inner = self.0.inner();
        if fault.lasts() {
            inner.troubles.forwarder.set(Some(fault.clone()));
        }
        match fault {
            Fault::Kill | Fault::Restart => {
                inner.forwarder.forget();
                inner.all_down();
            }
            Fault::DropStreams => inner.all_down(),
            Fault::Forget => inner.forwarder.forget(),
            Fault::Pause | Fault::Late(_) | Fault::Refuse(_) => {}
        }
        Ok(())
    }

    /// Connections that it does not know (any more) go DOWN.
    fn recover(&mut self) -> Result<(), String> {
        let inner = self.0.inner();
        inner.troubles.forwarder.set(None);
        if inner.forwarder.count() < inner.monitors.all().len() {
            inner.all_down();
        }
        Ok(())
    }
}

/// The control plane of a load balancer; its kernel forwards all the while.
pub struct LbProcess {
    nsmgr: Nsmgr,
    lb: Lb,
}

impl Faults for LbProcess {
    fn inflict(&mut self, fault: &Fault) -> Result<(), String> {
        match fault {
            Fault::Kill => self.nsmgr.kill_endpoint(self.lb.name()),
            Fault::DropStreams => self.nsmgr.down_endpoint(self.lb.name()),
            Fault::Restart => {
                self.lb.forget();
                self.nsmgr.down_endpoint(self.lb.name());
            }
            Fault::Forget => self.lb.forget(),
            Fault::Pause | Fault::Late(_) | Fault::Refuse(_) => {
                self.lb.trouble().set(Some(fault.clone()));
            }
        }
        Ok(())
    }

    /// One that does not know its connections (any more) ends their monitor.
    fn recover(&mut self) -> Result<(), String> {
        self.lb.trouble().set(None);
        if self.lb.interfaces().is_empty() {
            self.nsmgr.down_endpoint(self.lb.name());
        }
        self.nsmgr.revive_endpoint(self.lb.name())
    }
}

/// A target, which is a client: it answers no calls, so it cannot be late with
/// an answer, or refuse one. Of one that ended without a Close nsmgr ends the
/// connection, in the end; here at once.
pub struct TargetProcess {
    nsmgr: Nsmgr,
    target: Arc<Target>,
}

impl Faults for TargetProcess {
    fn inflict(&mut self, fault: &Fault) -> Result<(), String> {
        let id = self.target.connection_id();
        match fault {
            Fault::Kill => self.nsmgr.kill_target(&id),
            Fault::DropStreams => self.nsmgr.inner().targets.lose_sight(&id),
            Fault::Restart => {
                self.nsmgr.kill_target(&id);
                self.target.connect()?;
            }
            Fault::Forget => {
                self.nsmgr.kill_target(&id);
                self.target.forget();
                self.target.connect()?;
            }
            Fault::Pause | Fault::Late(_) | Fault::Refuse(_) => {
                return Err(format!("{fault}: a target answers no calls"));
            }
        }
        Ok(())
    }

    fn recover(&mut self) -> Result<(), String> {
        self.target.connect()
    }
}

impl Nsmgr {
    /// The registry's bad days.
    #[must_use]
    pub fn registry_process(&self) -> RegistryProcess {
        RegistryProcess(self.clone())
    }

    /// The forwarder's bad days.
    #[must_use]
    pub fn forwarder_process(&self) -> ForwarderProcess {
        ForwarderProcess(self.clone())
    }

    /// A load balancer's bad days.
    #[must_use]
    pub fn lb_process(&self, lb: &Lb) -> LbProcess {
        LbProcess {
            nsmgr: self.clone(),
            lb: lb.clone(),
        }
    }

    /// A target's bad days.
    #[must_use]
    pub fn target_process(&self, target: &Arc<Target>) -> TargetProcess {
        TargetProcess {
            nsmgr: self.clone(),
            target: Arc::clone(target),
        }
    }

    fn kill_target(&self, id: &str) {
        let inner = self.inner();
        inner.timers.cancel(&format!("target/{id}"));
        inner.targets.forget(id);
        self.end_connection(id);
    }

    /// The connections to an endpoint go DOWN, as when its monitor ends.
    pub fn down_endpoint(&self, name: &str) {
        let inner = self.inner();
        for connection in inner.monitors.all() {
            if connection.network_service_endpoint_name == name {
                inner.monitors.down(&connection.id);
            }
        }
    }

    /// An endpoint that was killed is alive again, and registers.
    pub fn revive_endpoint(&self, name: &str) -> Result<(), String> {
        let inner = self.inner();
        if let Some(lb) = inner.state.lock().lbs.get_mut(name) {
            lb.alive = true;
        }
        inner.keep_lb(name).map_err(|error| error.to_string())
    }
}

impl Inner {
    /// Ends the streams that only tell what the registry knows.
    pub(super) fn end_finds(&self, status: &RpcStatus) {
        self.registry.end_streams(status);
        for find in self.finds.lock().drain(..) {
            find.end(status.clone());
        }
    }

    fn all_down(&self) {
        for connection in self.monitors.all() {
            self.monitors.down(&connection.id);
        }
    }

    /// Registers all load balancers that live.
    fn keep_lbs(&self) -> Result<(), String> {
        let names: Vec<String> = self.state.lock().lbs.keys().cloned().collect();
        let mut names = names.iter();
        names
            .try_for_each(|name| self.keep_lb(name))
            .map_err(|error| error.to_string())
    }
}
